package worker_test

import (
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker"
	"github.com/ownllm/ownllm/worker/backend"
	"github.com/ownllm/ownllm/worker/demo"
)

func TestReplies(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 0)
	streamed := h.start(request("demo", true, numbered(50, 0)))
	streamed.wantNumbered(50)
	if u := streamed.reply.Usage(); u.CompletionTokens != 50 || u.PromptTokens == 0 {
		t.Errorf("usage is %+v", u)
	}
	whole := h.start(request("demo", false, numbered(3, 0)))
	if err := whole.end(); err != nil {
		t.Fatal(err)
	}
	if got := gjson.Get(whole.body.String(), "choices.0.message.content").Str; got != " 0 1 2" {
		t.Errorf("whole reply is %s", whole.body.String())
	}
	failing := h.start(request("demo", true, map[string]any{"status": 429, "retry_after": 7}))
	if err := failing.end(); err == nil || failing.body.Len() != 0 {
		t.Errorf("a backend's refusal came as %q, %v", failing.body.String(), err)
	}
	broken := h.start(request("demo", true, map[string]any{"numbered": true, "tokens": 50, "die_after": 20}))
	if err := broken.end(); err == nil || err.Code != schemas.CodeBackendError || broken.text.Len() == 0 {
		t.Errorf("a backend that breaks off gave %q and %v", broken.text.String(), err)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	if n := s.stats().Started; n != 4 {
		t.Errorf("the backend got %d requests, want 4", n)
	}
}

// wide is a demo model whose window takes everything.
func wide() []schemas.Model {
	list := models("demo")
	list[0].ContextWindow = 1 << 30
	return list
}

// More than the worker keeps, faster than a second passes.
func TestReplyLargerThanWhatIsKept(t *testing.T) {
	t.Parallel()
	faults := demo.NoFaults()
	faults.Text = strings.Repeat("0123456789abcde ", 12<<20/16)
	h, _ := one(t, demo.Options{Models: wide(), Faults: &faults}, 0)
	c := h.start(request("demo", false, nil))
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	if got := gjson.Get(c.body.String(), "choices.0.message.content").Str; got != faults.Text {
		t.Errorf("got %d bytes of %d", len(got), len(faults.Text))
	}
}

func TestLargeBody(t *testing.T) {
	t.Parallel()
	h, _ := one(t, demo.Options{Models: wide()}, 0)
	req := request("demo", false, map[string]any{"echo": true})
	padding := strings.Repeat(" ", 2<<20)
	req.Body = strings.TrimSuffix(req.Body, "}") + padding + `}`
	c := h.start(req)
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	echo := gjson.Get(c.body.String(), "choices.0.message.content").Str
	if !strings.Contains(echo, padding) {
		t.Errorf("the backend got %d bytes of %d", len(echo), len(req.Body))
	}
}

// The slots of a backend are for all its models together.
func TestSlotsAreOfTheBackend(t *testing.T) {
	t.Parallel()
	const slots = 3
	h, s := one(t, demo.Options{Models: models("a", "b")}, slots)
	var chats []*chat
	for i := range 12 {
		chats = append(chats, h.start(request([]string{"a", "b"}[i%2], true, numbered(20, time.Second))))
	}
	for _, c := range chats {
		c.wantNumbered(20)
	}
	if peak := s.stats().Peak; peak != slots {
		t.Errorf("%d requests ran at once, want %d", peak, slots)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	if got := h.status().Slots; got != slots {
		t.Errorf("the heartbeat says %d slots", got)
	}
}

// A backend may learn only later how many slots it has.
func TestSlotsThatChange(t *testing.T) {
	t.Parallel()
	few, many := demo.Options{Models: models("demo")}, demo.Options{Models: models("demo")}
	few.Models[0].Slots, many.Models[0].Slots = 1, 3
	h, s := one(t, few, 0)
	first := s.demo.Load()
	var chats []*chat
	for range 3 {
		chats = append(chats, h.start(request("demo", true, numbered(20, 10*time.Second))))
	}
	chats[0].begin()
	s.demo.Store(demo.New(many))
	for _, c := range chats {
		c.begin()
	}
	if peak := first.Stats().Peak; peak != 1 {
		t.Errorf("%d requests ran at once where one may", peak)
	}
	if active := s.stats().Active; active != 2 {
		t.Errorf("%d of 2 run beside the first", active)
	}
	for _, c := range chats {
		c.wantNumbered(20)
	}
}

// The first backend that has a model serves it.
func TestTwoBackends(t *testing.T) {
	t.Parallel()
	first, second := newServer(t, demo.Options{Models: models("a", "b")}), newServer(t, demo.Options{Models: models("b", "c")})
	h := newHouse(t, worker.Config{Backends: []backend.Config{{URL: first.URL}, {URL: second.URL}}})
	for _, m := range []string{"a", "b", "c"} {
		h.start(request(m, true, numbered(2, 0))).wantNumbered(2)
	}
	if a, b := first.stats().Started, second.stats().Started; a != 2 || b != 1 {
		t.Errorf("the first backend got %d requests and the second %d, want 2 and 1", a, b)
	}
}

func TestCancelWhileWaitingForASlot(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	running := h.start(request("demo", true, numbered(30, 8*time.Second))).begin()
	waiting := h.start(request("demo", true, numbered(30, 0)))
	until(t, "the second to wait at the worker", func() bool { return h.status().Waiting == 1 })
	waiting.reply.Close()
	if n := h.depth(); n != 1 {
		t.Errorf("%d jobs in the queue, want the one that runs", n)
	}
	until(t, "the second to be gone", func() bool { return h.status().Waiting == 0 })
	// The one behind it isn't held up.
	third := h.start(request("demo", true, numbered(3, 0)))
	running.wantNumbered(30)
	third.wantNumbered(3)
	if n := s.stats().Started; n != 2 {
		t.Errorf("the backend got %d requests, want 2", n)
	}
}

func TestCancelWhileRunning(t *testing.T) {
	t.Parallel()
	h, s := one(t, demo.Options{}, 1)
	c := h.start(request("demo", true, numbered(1000, time.Minute))).begin()
	closed := time.Now()
	c.reply.Close()
	until(t, "the backend to be free", func() bool { return s.stats().Active == 0 })
	if took := time.Since(closed); took > time.Second+slack {
		t.Errorf("that took %s", took)
	}
	until(t, "an empty queue", func() bool { return h.depth() == 0 })
	h.start(request("demo", true, numbered(3, 0))).wantNumbered(3)
}
