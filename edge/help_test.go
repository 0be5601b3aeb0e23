package edge_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/presence"
)

// restore tells the edge of the agents that the books know, as at its start.
func (h *house) restore() {
	h.t.Helper()
	list, _, err := h.store.ListAgents(context.Background(), "", books.Page{})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, a := range list {
		h.agents.Restore(presence.Known{Tenant: a.Tenant, Agent: a.ID, Name: a.Name, LastSeen: a.LastSeen, Inventory: a.Inventory})
	}
}

// known reports whether the edge has a key in memory.
func (h *house) known(secret string) bool {
	key, err := apikey.FromSecret(secret)
	if err != nil {
		h.t.Fatal(err)
	}
	_, ok := h.keys.Cached(key, "")
	return ok
}

// upload sends a large body as an ordinary client of Go does, and returns the code of
// the refusal.
func (h *house) upload(key, body string, chunked bool) (string, error) {
	var r io.Reader = strings.NewReader(body)
	if chunked {
		r = io.MultiReader(r) // of unknown length
	}
	req, err := http.NewRequest(http.MethodPost, "http://"+h.addr+"/v1/chat/completions", r)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+key)
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return codeIn(string(b)), err
}

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(list))
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// sorted puts the methods of an Allow header into order.
func sorted(list string) string {
	all := strings.Split(list, ", ")
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// certificate makes a certificate for edge.test, and returns its files.
func certificate(t *testing.T) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"edge.test"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	privateDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pool = x509.NewCertPool()
	pool.AddCert(must(x509.ParseCertificate(der)))
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", privateDER), pool
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// calm fails the test if anything was logged that an operator would have to look at, but for
// Postgres, which on an overrun machine may not answer for a second.
func (h *house) calm() {
	h.t.Helper()
	for line := range strings.Lines(h.log.String()) {
		if (strings.Contains(line, "level=ERROR") || strings.Contains(line, "level=WARN")) && !strings.Contains(line, "key changes can't be read") {
			h.t.Errorf("logged: %s", line)
		}
	}
}
