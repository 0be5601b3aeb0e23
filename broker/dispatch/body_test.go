package dispatch_test

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/schemas"
)

// fetch asks for a piece of the body.
func fetch(t testing.TB, nc *nats.Conn, subject string, payload []byte) string {
	t.Helper()
	m, err := nc.Request(subject, payload, patience)
	if err != nil {
		t.Fatal(err)
	}
	return string(m.Data)
}

func TestLargeBodyIsFetched(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	req := request()
	req.Body = strings.Repeat("0123456789abcdef", schemas.MaxInlineBody/16) + "x"
	reply := h.start(req)
	d := a.pull()
	if d.body != nil || d.job.BodySize != len(req.Body) {
		t.Fatalf("job holds %d bytes and says %d, want a body of %d elsewhere", len(d.body), d.job.BodySize, len(req.Body))
	}
	subject := schemas.BodySubject(agentA, d.job.Owner, d.job.Nonce)
	var got strings.Builder
	for got.Len() < len(req.Body) {
		piece := fetch(t, a.nc, subject, schemas.BodyRequest{Offset: got.Len()}.Encode())
		if piece == "" || len(piece) > schemas.BodyPiece {
			t.Fatalf("piece at %d has %d bytes", got.Len(), len(piece))
		}
		got.WriteString(piece)
	}
	if got.String() != req.Body {
		t.Error("the body came out changed")
	}
	// A piece can be asked for anywhere and again, and there is nothing beyond the end.
	if piece := fetch(t, a.nc, subject, schemas.BodyRequest{Offset: 5}.Encode()); piece != req.Body[5:5+schemas.BodyPiece] {
		t.Error("the piece at 5 is another")
	}
	for name, payload := range map[string]string{
		"at the end": `{"offset":524289}`, "far beyond": `{"offset":9000000000000000000}`, "negative": `{"offset":-1}`,
		"no number": `{"offset":"1"}`, "garbage": `x`, "empty": ``,
	} {
		if piece := fetch(t, a.nc, subject, []byte(payload)); piece != "" {
			t.Errorf("%s: got %d bytes", name, len(piece))
		}
	}
	first := schemas.BodyRequest{}.Encode()
	if piece := fetch(t, a.nc, schemas.BodySubject(agentA, d.job.Owner, schemas.NewNonce()), first); piece != "" {
		t.Errorf("another nonce: got %d bytes", len(piece))
	}
	if piece := fetch(t, h.server.Agent(tenant, agentB), schemas.BodySubject(agentB, d.job.Owner, d.job.Nonce), first); piece != "" {
		t.Errorf("another agent: got %d bytes", len(piece))
	}
	d.claim()
	d.done("one\n")
	wantText(t, reply, "one\n")
	reply.Close()
	if piece := fetch(t, a.nc, subject, first); piece != "" {
		t.Errorf("after the end: got %d bytes", len(piece))
	}
}

// The largest body that travels in the job is there, and isn't served once more.
func TestSmallBodyTravelsInTheJob(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a := h.agent(agentA)
	req := request()
	req.Body = strings.Repeat("x", schemas.MaxInlineBody)
	h.start(req)
	d := a.pull()
	if string(d.body) != req.Body || d.job.BodySize != 0 {
		t.Errorf("job holds %d bytes and says %d", len(d.body), d.job.BodySize)
	}
	if piece := fetch(t, a.nc, schemas.BodySubject(agentA, d.job.Owner, d.job.Nonce), schemas.BodyRequest{}.Encode()); piece != "" {
		t.Errorf("got %d bytes", len(piece))
	}
}

// An attempt that was given up gets no body any more; its successor does.
func TestBodyOfTheNextAttempt(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 10, nil)
	a, b := h.agent(agentA), h.agent(agentB)
	req := request()
	req.Body = strings.Repeat("y", schemas.MaxInlineBody+1)
	reply := h.start(req)
	first := a.pull()
	a.lost()
	done := make(chan struct{})
	go func() {
		defer close(done)
		wantText(t, reply, "one\n")
	}()
	second := b.pull()
	ask := schemas.BodyRequest{Offset: schemas.MaxInlineBody}.Encode()
	if piece := fetch(t, a.nc, schemas.BodySubject(agentA, first.job.Owner, first.job.Nonce), ask); piece != "" {
		t.Errorf("the first attempt got %q", piece)
	}
	if piece := fetch(t, b.nc, schemas.BodySubject(agentB, second.job.Owner, second.job.Nonce), ask); piece != "y" {
		t.Errorf("the second attempt got %q", piece)
	}
	second.claim()
	second.done("one\n")
	<-done
}
