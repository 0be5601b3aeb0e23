package edge_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/edge"
)

// A flood of bad keys is turned away without a word to Postgres, while keys that are
// known to be good work from the same address.
func TestFloodOfBadKeys(t *testing.T) {
	t.Parallel()
	const burst = 20
	h := build(t, plan{edge: edge.Config{FailureRate: 0.01, FailureBurst: burst}})
	_, fresh := h.newKey(books.NewKey{}) // good, but the edge doesn't know it yet
	until(t, "the good key to be known", func() bool {
		resp, _ := h.do("GET", "/v1/models", h.key, "")
		return resp.StatusCode == 200 && h.known(h.key)
	})
	bad := 0
	try := func() refusal {
		bad++
		key := fmt.Sprintf("sk-ownllm-%024d", bad)
		if bad%2 == 0 {
			return h.code("GET", "/v1/models", key, "")
		}
		return h.code("POST", "/v1/chat/completions", key, ask(""))
	}
	for range burst {
		if got := try(); got != (refusal{401, "key_invalid"}) {
			t.Fatalf("bad key %d: %+v", bad, got)
		}
	}
	resp, body := h.do("GET", "/v1/models", "sk-ownllm-AAAAAAAAAAAAAAAAAAAAAAAA", "")
	checkRefusal(t, resp, body, "too_many_failures", "")
	if resp.Header.Get("Retry-After") != "2" {
		t.Errorf("Retry-After is %q", resp.Header.Get("Retry-After"))
	}

	// From here on, whoever asks Postgres waits for the answer.
	h.database.Stall()
	start := time.Now()
	for range 50 {
		if got := try(); got != (refusal{429, "too_many_failures"}) {
			t.Fatalf("bad key %d: %+v", bad, got)
		}
	}
	// Each that waited for Postgres would take 5 s, and half of them are of the same kind.
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("50 refusals took %s", took)
	}
	h.database.Restore()
	until(t, "the good key to work", func() bool {
		resp, _ := h.do("POST", "/v1/chat/completions", h.key, ask(""))
		return resp.StatusCode == 200
	})
	// All other bad requests look the same by now, and so do good keys that would have to
	// be looked up.
	for _, test := range []struct{ method, path, key, body string }{
		{"GET", "/v1/models", "malformed", ""},
		{"GET", "/v1/models", fresh, ""},
		{"GET", "/nowhere", "", ""},
		{"PUT", "/v1/models", "", ""},
		{"FOO", "/v1/models", "", ""},
		{"POST", "/v1/chat/completions", h.key, "{"},
		{"GET", "/v1/models/none", h.key, ""},
		{"GET", "/api/v1/tenants", "wrong", ""},
	} {
		if got := h.code(test.method, test.path, test.key, test.body); got != (refusal{429, "too_many_failures"}) {
			t.Errorf("%s %s: %+v", test.method, test.path, got)
		}
	}
}

// The allowance comes back.
func TestAllowanceRefills(t *testing.T) {
	t.Parallel()
	h := build(t, plan{empty: true, edge: edge.Config{FailureRate: 2, FailureBurst: 1}})
	code := func() string { return h.code("GET", "/v1/models", "malformed", "").code }
	until(t, "the allowance to be used up", func() bool { return code() == "too_many_failures" })
	until(t, "the allowance to refill", func() bool { return code() == "key_malformed" })
}

func TestWhoseFailureItIs(t *testing.T) {
	t.Parallel()
	const list = "X-Forwarded-For: "
	for _, test := range []struct {
		name    string
		trusted []string
		// The first request uses up the allowance of its client. Does the second count as
		// the same client's?
		first, second []string
		same          bool
	}{
		{"no proxy", nil, []string{list + "1.1.1.1"}, []string{list + "2.2.2.2"}, true},
		{"peer isn't trusted", []string{"10.0.0.0/8"}, []string{list + "1.1.1.1"}, []string{list + "2.2.2.2"}, true},
		{"trusted", []string{"127.0.0.1/32"}, []string{list + "1.1.1.1"}, []string{list + "2.2.2.2"}, false},
		{"trusted, same client", []string{"127.0.0.1/32"}, []string{list + "1.1.1.1"}, []string{list + "1.1.1.1"}, true},
		{"the client's own entries", []string{"127.0.0.1/32"}, []string{list + "9.9.9.9, 1.1.1.1"}, []string{list + "8.8.8.8,1.1.1.1"}, true},
		{"the client's own header", []string{"127.0.0.1/32"}, []string{list + "9.9.9.9", list + "1.1.1.1"}, []string{list + "8.8.8.8", list + "1.1.1.1"}, true},
		{"another client behind two headers", []string{"127.0.0.1/32"}, []string{list + "9.9.9.9", list + "1.1.1.1"}, []string{list + "9.9.9.9", list + "2.2.2.2"}, false},
		{"two proxies", []string{"127.0.0.1/32", "10.0.0.0/8"}, []string{list + "1.1.1.1, 10.0.0.1"}, []string{list + "2.2.2.2, 10.0.0.1, 10.0.0.2"}, false},
		{"nonsense", []string{"127.0.0.1/32"}, []string{list + "1.1.1.1, what"}, []string{list + "2.2.2.2, what"}, true},
		{"with a port", []string{"127.0.0.1/32"}, []string{list + "1.1.1.1:1000"}, []string{list + "1.1.1.1:2000"}, true},
		{"IPv6", []string{"127.0.0.1/32"}, []string{list + "2001:db8::1"}, []string{list + "[2001:db8::2]:443"}, true},
		{"mapped IPv4", []string{"127.0.0.1/32"}, []string{list + "::ffff:1.1.1.1"}, []string{list + "1.1.1.1"}, true},
		{"nothing", []string{"127.0.0.1/32"}, nil, []string{list + "1.1.1.1"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := build(t, plan{empty: true, edge: edge.Config{FailureRate: 0.01, FailureBurst: 1, TrustedProxies: prefixes(test.trusted...)}})
			if got := h.code("GET", "/v1/models", "malformed", "", test.first...); got.code != "key_malformed" {
				t.Fatalf("first: %+v", got)
			}
			got := h.code("GET", "/v1/models", "malformed", "", test.second...)
			if same := got.code == "too_many_failures"; same != test.same {
				t.Errorf("counted as the same client: %v (%s)", same, strings.Join(test.second, "; "))
			}
		})
	}
}
