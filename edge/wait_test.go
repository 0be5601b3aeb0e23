package edge_test

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/dispatch"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// A request waits for a model that isn't in memory for as long as it asks to.
func TestWaitForAModel(t *testing.T) {
	t.Parallel()
	h := build(t, plan{dispatch: func(c *dispatch.Config) { c.ColdWait = 100 * time.Millisecond }})
	load := demo.NoFaults()
	load.LoadMS = 2000
	if err := h.backend.SetFaults("demo", load); err != nil {
		t.Fatal(err)
	}
	until(t, "the model to be out of memory", func() bool {
		m, _ := h.agents.Find(h.tenant.ID, "demo")
		return m.State == schemas.ModelCold
	})
	const body = `{"model":"demo","messages":[{"role":"user","content":"Hi"}],"stream":true}`
	resp, text := h.do("POST", "/v1/chat/completions", h.key, body)
	if resp.StatusCode != 503 || !strings.Contains(text, "model_loading") {
		t.Fatalf("without a wish: %s %s", resp.Status, text)
	}
	if after, err := strconv.Atoi(resp.Header.Get("Retry-After")); err != nil || after < 2 || after > 10 {
		t.Errorf("Retry-After is %q", resp.Header.Get("Retry-After"))
	}
	resp, text = h.do("POST", "/v1/chat/completions", h.key, body, "X-OwnLLM-Wait: 30s")
	if resp.StatusCode != 200 || !strings.Contains(text, "[DONE]") {
		t.Errorf("with a wish: %s %s", resp.Status, text)
	}
	until(t, "the model to be known to be in memory", func() bool {
		m, _ := h.agents.Find(h.tenant.ID, "demo")
		return m.State == schemas.ModelReady
	})
	for _, wish := range []string{"soon", "-1s", "-5", "61m", "99999999999999999999", "3 s"} {
		if got := h.code("POST", "/v1/chat/completions", h.key, body, "X-OwnLLM-Wait: "+wish); got != (refusal{400, "invalid_value"}) {
			t.Errorf("%q: %+v", wish, got)
		}
	}
	for _, wish := range []string{"0", "5", "1m30s"} {
		if resp, text := h.do("POST", "/v1/chat/completions", h.key, body, "X-OwnLLM-Wait: "+wish); resp.StatusCode != 200 {
			t.Errorf("%q: %s %s", wish, resp.Status, text)
		}
	}
}
