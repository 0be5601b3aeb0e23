package backend

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

func TestLeft(t *testing.T) {
	const s = time.Second
	for _, test := range []struct {
		about             string
		estimate, elapsed time.Duration
		done              float64
		want              time.Duration
	}{
		{"nothing is known", 0, 3 * s, 0, 0},
		{"by the estimate", 20 * s, 3 * s, 0, 17 * s},
		{"just begun", 20 * s, 0, 0, 20 * s},
		{"nearly over", 20 * s, 19 * s, 0, 4750 * time.Millisecond},
		{"overdue", 4 * s, 10 * s, 0, 2500 * time.Millisecond},
		{"long overdue", 4 * s, 100 * s, 0, 4 * s},
		{"a short one, overdue", 2 * s, 2 * s, 0, s},
		{"by its pace", 4 * s, 10 * s, 0.25, 30 * s},
		{"by its pace, without an estimate", 0, 10 * s, 0.5, 10 * s},
		{"too little of it", 20 * s, 3 * s, 0.01, 17 * s},
		{"done, but not yet said so", 20 * s, 3 * s, 1, s},
	} {
		if got := left(test.estimate, test.elapsed, test.done); got != test.want {
			t.Errorf("%s: %s, want %s", test.about, got, test.want)
		}
	}
}

func TestPartDone(t *testing.T) {
	for text, want := range map[string]float64{
		`{"stages":["text_model","mmproj_model"],"current":"text_model","value":0.5}`:   0.25,
		`{"stages":["text_model","mmproj_model"],"current":"mmproj_model","value":0.5}`: 0.75,
		`{"stages":["text_model"],"current":"text_model","value":1}`:                    1,
		`{"stage":"text_model","value":0.42}`:                                           0.42,
		`{"stage":"mmproj_model","value":0.42}`:                                         -1,
		`{"stage":"fit_params"}`:                                                        -1,
		`{"value":7}`:                                                                   -1,
		`{"value":-1}`:                                                                  -1,
		`{"value":"half"}`:                                                              -1,
		`[]`:                                                                            -1,
		`null`:                                                                          -1,
	} {
		got, ok := partDone(gjson.Parse(text))
		if !ok {
			got = -1
		}
		if got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

// A router tells by events how much of a load is done, and so does the inventory.
func TestRouterTellsProgress(t *testing.T) {
	f := newRouter(t)
	b := probe(t, Config{URL: f.URL})
	models(t, b)
	said, loaded := make(chan string), make(chan struct{})
	f.set("GET /models/sse", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for {
			select {
			case <-r.Context().Done():
				return
			case text := <-said:
				_, _ = io.WriteString(w, text)
				w.(http.Flusher).Flush()
			}
		}
	})
	f.set("POST /models/load", says(200, `{"success":true}`))
	ended := make(chan error, 1)
	go func() {
		ended <- b.Load(t.Context(), "b")
		close(loaded)
	}()
	event := func(model string, value float64) string {
		return fmt.Sprintf("data: {\"model\":%q,\"event\":\"status_change\",\"data\":{\"status\":\"loading\",\"progress\":{\"stages\":[\"text_model\"],\"current\":\"text_model\",\"value\":%v}}}\n\n", model, value)
	}
	said <- ": hello\n\ndata: {nonsense\n\ndata: {\"model\":\"b\",\"event\":\"status_change\",\"data\":{\"status\":\"loading\"}}\n\n"
	said <- event("a", 0.9)
	said <- event("b", 0.5)
	for deadline := time.Now().Add(10 * time.Second); models(t, b)["b"].LoadPercent != 50; {
		if time.Now().After(deadline) {
			t.Fatalf("it says %+v", models(t, b)["b"])
		}
	}
	if m := models(t, b)["b"]; m.State != schemas.ModelLoading || m.LoadMS < 1000 {
		t.Errorf("while it loads: %+v", m)
	}
	// By its pace, half of the load takes as long as the other half took.
	b.mu.Lock()
	b.loads["b"].began = time.Now().Add(-20 * time.Second)
	b.mu.Unlock()
	if d, percent := b.LoadLeft("b"); percent != 50 || d < 19*time.Second || d > 25*time.Second {
		t.Errorf("%s are left, and %d%% done", d, percent)
	}
	f.set("GET /models", says(200, "%s", strings.Replace(routerList, `"unloaded","args":["llama-server","-c"`, `"loaded","args":["llama-server","-c"`, 1)))
	<-loaded
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if m := models(t, b)["b"]; m.State != schemas.ModelReady || m.LoadPercent != 0 || m.LoadMS != 0 {
		t.Errorf("afterwards: %+v", m)
	}
}

// A load that the server has started by itself is measured, too, so that the next one has an
// estimate; one that was under way before anybody looked isn't.
func TestLoadsOfTheServerAreMeasured(t *testing.T) {
	f := newLlama(t)
	b := probe(t, Config{URL: f.URL})
	loading := func() { f.set("GET /props", says(503, llamaLoading)) }
	loadedAfter := func(d time.Duration) {
		b.mu.Lock()
		b.known["smol"].loading = time.Now().Add(-d)
		b.mu.Unlock()
		f.set("GET /props", says(200, llamaPropsJSON))
		if m := models(t, b)["smol"]; m.State != schemas.ModelReady {
			t.Fatalf("loaded: %+v", m)
		}
	}
	loading()
	models(t, b)
	// 145 MB.
	if d, _ := b.LoadLeft("smol"); d < time.Second || d > 3*time.Second {
		t.Errorf("by its size it takes %s", d)
	}
	loadedAfter(time.Minute)
	loading()
	models(t, b)
	if d, _ := b.LoadLeft("smol"); d < time.Second || d > 3*time.Second {
		t.Errorf("what nobody saw begin counts: %s", d)
	}
	loadedAfter(8 * time.Second)
	loading()
	if m := models(t, b)["smol"]; m.LoadMS < 7000 || m.LoadMS > 9000 {
		t.Errorf("the next one: %+v", m)
	}
	b.mu.Lock()
	b.known["smol"].loading = time.Now().Add(-5 * time.Second)
	b.mu.Unlock()
	if d, _ := b.LoadLeft("smol"); d < 2500*time.Millisecond || d > 3500*time.Millisecond {
		t.Errorf("after 5 of 8 seconds: %s", d)
	}
	if d, percent := b.LoadLeft("nobody"); d != 0 || percent != 0 {
		t.Errorf("a model that isn't known: %s, %d%%", d, percent)
	}
}
