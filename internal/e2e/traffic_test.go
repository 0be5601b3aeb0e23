package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/faultproxy"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

// asyncAPI is what the AsyncAPI document says, as far as messages are judged by it.
type asyncAPI struct {
	Channels map[string]struct {
		Address  *string
		Messages map[string]any
	}
	Operations map[string]struct {
		Channel reference
		Reply   *struct{ Messages []reference }
	}
	Components struct {
		Messages map[string]struct {
			ContentType string
			Payload     json.RawMessage
		}
	}
	schemas map[string]*jsonschema.Schema // by message
}

type reference struct {
	Ref string `json:"$ref"`
}

// last is the name of what is referred to.
func (r reference) last() string { return r.Ref[strings.LastIndexByte(r.Ref, '/')+1:] }

func loadAsyncAPI(t *testing.T) *asyncAPI {
	t.Helper()
	d := new(asyncAPI)
	if err := json.Unmarshal(schemas.AsyncAPI, d); err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.UseLoader(jsonschema.SchemeURLLoader{})
	const base = "https://ownllm.app/schemas/v1/"
	files, err := fs.Glob(schemas.JSON, "json/*.json")
	if err != nil {
		t.Fatal(err)
	}
	add := func(name string, b []byte) {
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		if err == nil {
			err = c.AddResource(base+name, doc)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range files {
		b, err := schemas.JSON.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		add(strings.TrimPrefix(file, "json/"), b)
	}
	d.schemas = make(map[string]*jsonschema.Schema)
	for name, m := range d.Components.Messages {
		if m.Payload == nil {
			continue
		}
		var to reference
		if err := json.Unmarshal(m.Payload, &to); err != nil {
			t.Fatal(err)
		}
		at := to.last() + ".json"
		if to.Ref == "" {
			at = "message-" + name + ".json"
			add(at, m.Payload)
		}
		if d.schemas[name], err = c.Compile(base + at); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// channel is the name of the channel that a subject is of, or empty: of several the one that
// leaves the least open.
func (d *asyncAPI) channel(subject string) (channel string) {
	tokens := strings.Split(subject, ".")
	least := len(tokens) + 1
	for name, c := range d.Channels {
		if c.Address == nil {
			continue
		}
		if slices.EqualFunc(strings.Split(*c.Address, "."), tokens, func(want, got string) bool { return want == got || want[0] == '{' }) {
			if open := strings.Count(*c.Address, "{"); open < least {
				channel, least = name, open
			}
		}
	}
	return channel
}

// replies are the messages by which those to a channel may be answered.
func (d *asyncAPI) replies(channel string) (names []string) {
	for _, o := range d.Operations {
		if o.Channel.last() == channel && o.Reply != nil {
			for _, m := range o.Reply.Messages {
				names = append(names, m.last())
			}
		}
	}
	return names
}

// judge says which of the messages a payload is, or why it is none.
func (d *asyncAPI) judge(names []string, data []byte) (string, error) {
	err := fmt.Errorf("nothing may come there")
	for _, name := range names {
		m := d.Components.Messages[name]
		schema := d.schemas[name]
		switch {
		case name == "nothing" && len(data) > 0:
			err = fmt.Errorf("%d bytes where nothing should be", len(data))
			continue
		case name == "echo":
			if _, err = time.ParseDuration(string(data)); err != nil {
				continue
			}
			return name, nil
		case schema == nil:
			return name, nil
		case name == "bundle" && len(data) > 0:
			// The first entry is judged here, and the others one after the other.
			var frame, left []byte
			if _, frame, left, err = schemas.CutEntry(data); err != nil {
				continue
			}
			if _, err = d.judge([]string{"frame"}, frame); err != nil {
				continue
			}
			if len(left) > 0 {
				if _, err = d.judge([]string{"bundle"}, left); err != nil {
					continue
				}
			}
		}
		part := data
		if m.ContentType == "application/x-ownllm-head" {
			part, _, _ = bytes.Cut(data, []byte{'\n'})
		}
		var v any
		if v, err = jsonschema.UnmarshalJSON(bytes.NewReader(part)); err == nil {
			if err = schema.Validate(v); err == nil {
				return name, nil
			}
		}
	}
	return "", err
}

// wiretap records all that goes over the bus, in every account.
type wiretap struct {
	mu    sync.Mutex
	heard []overheard
}

type overheard struct {
	account string
	msg     *nats.Msg
}

func tapWires(t *testing.T, c *stack.Cluster) *wiretap {
	t.Helper()
	w := new(wiretap)
	for _, user := range []string{bus.UserCore, bus.UserAgents, bus.UserIngress} {
		nc, err := nats.Connect(c.NATSURL(), nats.UserInfo(user, c.Token()), nats.Name("wiretap"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		sub, err := nc.Subscribe(">", func(m *nats.Msg) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.heard = append(w.heard, overheard{user, m})
		})
		if err == nil {
			err = sub.SetPendingLimits(-1, -1)
		}
		if err == nil {
			err = nc.Flush()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if n, err := sub.Dropped(); err == nil && n > 0 {
				t.Errorf("%d messages weren't overheard in %s", n, user)
			}
		})
	}
	return w
}

// heardOn reports whether anything came to a subject that begins so.
func (w *wiretap) heardOn(prefix string) bool {
	return w.heardOf(func(subject string) bool { return strings.HasPrefix(subject, prefix) })
}

// heardOf reports whether there was a message on one of the subjects.
func (w *wiretap) heardOf(subject func(string) bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.heard, func(h overheard) bool { return subject(h.msg.Subject) })
}

// The subjects of nats-server, JetStream and micro themselves, and the one of them whose
// answers are messages of ours.
var (
	foreign = []string{"$JS.", "$SRV.", "$SYS.", "_CHECK_."}
	// jetstreamSays is how all answers of JetStream's API begin.
	jetstreamSays = []byte(`{"type":"io.nats.jetstream.api.`)
	pulls         = "$JS.API.CONSUMER.MSG.NEXT." + schemas.JobStreamPrefix
)

// TestTrafficIsAsDocumented overhears a cluster in which all goes on that can: every message
// has a subject that the AsyncAPI document knows, and a payload that the schema there allows.
func TestTrafficIsAsDocumented(t *testing.T) {
	t.Parallel()
	d := loadAsyncAPI(t)
	c := stack.StartCluster(t, "--open-tokens", "16")
	w := tapWires(t, c)
	wrong := haveEverythingHappen(t, c, w)

	w.mu.Lock()
	defer w.mu.Unlock()
	// What may come as an answer, by account and reply subject; nil: anything, it isn't ours.
	inboxes := make(map[[2]string][]string)
	for _, h := range w.heard {
		if h.msg.Reply == "" || strings.HasPrefix(h.msg.Reply, "$JS.ACK.") || d.channel(h.msg.Reply) != "" {
			continue
		}
		at := [2]string{h.account, h.msg.Reply}
		switch channel := d.channel(h.msg.Subject); {
		case channel != "":
			inboxes[at] = d.replies(channel)
		case strings.HasPrefix(h.msg.Subject, pulls):
			inboxes[at] = []string{"job"}
		default:
			inboxes[at] = nil
		}
	}
	seen := make(map[string]int)
	for _, h := range w.heard {
		m := h.msg
		channel := d.channel(m.Subject)
		may, answered := inboxes[[2]string{h.account, m.Subject}]
		switch {
		case channel != "":
			may = slices.Collect(maps.Keys(d.Channels[channel].Messages))
			seen[channel]++
			if wrong[string(m.Data)] {
				continue
			}
		case slices.ContainsFunc(foreign, func(prefix string) bool { return strings.HasPrefix(m.Subject, prefix) }),
			answered && may == nil,
			bytes.HasPrefix(m.Data, jetstreamSays),           // to a question from before anybody listened
			len(m.Data) == 0 && m.Header.Get("Status") != "": // what the server has to say
			continue
		case answered:
		case strings.HasPrefix(m.Subject, nats.InboxPrefix):
			may = []string{"echo"} // nobody else's word comes there unasked
		case strings.HasPrefix(m.Subject, schemas.Prefix+"in.") && wrong[m.Subject[strings.LastIndexByte(m.Subject, '.')+1:]]:
			continue
		default:
			t.Errorf("%s: nobody has asked for what comes to %s: %.200q", h.account, m.Subject, m.Data)
			continue
		}
		name, err := d.judge(may, m.Data)
		if err != nil {
			t.Errorf("%s: %s: %v: %.300q", h.account, m.Subject, err, m.Data)
		}
		seen[name]++
	}
	for name := range d.Components.Messages {
		if seen[name] == 0 {
			t.Errorf("no %s went over the bus", name)
		}
	}
	for name, channel := range d.Channels {
		if channel.Address != nil && seen[name] == 0 {
			t.Errorf("nothing went over %s", name)
		}
	}
	t.Logf("%d messages: %v", len(w.heard), seen)
}

// haveEverythingHappen has every sort of message sent. It returns what publishers sent that is
// wrong on purpose.
func haveEverythingHappen(t *testing.T, c *stack.Cluster, w *wiretap) (wrong map[string]bool) {
	t.Helper()
	ctx := t.Context()
	c.StartBroker("--open-tokens", "16") // a second one, so that they ask each other
	edges := c.StartEdges(2, "--open-tokens", "16")
	setPrice(t, c, demo.ModelID, 1)
	key, secret := newKey(t, c, books.NewKey{BudgetCents: new(int64(100)), Concurrency: new(1000)})
	backend := stack.StartBackend(t, longDemo())
	workers := []*stack.Worker{c.StartWorker(backend.URL).Serving(), c.StartWorker(backend.URL).Serving()}
	cut := faultproxy.New(t, c.NATSURL())
	cut.Cut()
	c.StartWorker(backend.URL, "--nats-url", cut.URL(), "--server", "http://"+edges[0].Addr)
	awaitModel(t, edges, secret, demo.ModelID)
	client := newClient(edges[0].BaseURL, secret)
	defer client.close()
	p := newPublisher(t, c.NATSURL(), key, secret)
	p.awaitModel(t)
	pace := func(tokens int) map[string]any {
		return map[string]any{"demo": map[string]any{"numbered": true, "tokens": tokens, "tokens_per_second": 100}}
	}

	for _, stream := range []bool{true, false} {
		wantWhole(t, client.chat(ctx, stream, pace(60)))
		wantDone(t, p.chat(ctx, stream, pace(60)))
	}
	large := pace(3)
	large["padding"] = strings.Repeat("x", schemas.MaxInlineBody+schemas.BodyPiece)
	wantWhole(t, client.chat(ctx, true, large))

	wrong = map[string]bool{"embed": true}
	for _, body := range []string{"hello", "[]", `{"messages":[]}`, `{"model":"demo","messages":[{"role":"user","content":"x"}],"n":-1}`} {
		wrong[body] = true
		for _, operation := range []string{schemas.OperationChat, schemas.OperationCancel, schemas.OperationSubmit, schemas.OperationResult, "embed"} {
			if r := p.follow(ctx, operation, []byte(body), func(*heard, *nats.Msg) {}); r.err == nil {
				t.Errorf("%s %s: %+v", operation, body, r)
			}
		}
	}
	for _, fault := range []map[string]any{{"status": 500}, {"status": 503}, {"die_after": 0}, {"status": 400}} {
		if r := p.chat(ctx, true, map[string]any{"demo": fault}); r.err == nil {
			t.Errorf("%v: %+v", fault, r)
		}
		if r := client.chat(ctx, false, map[string]any{"demo": fault}); r.err == nil && r.status == http.StatusOK {
			t.Errorf("%v: %+v", fault, r)
		}
	}

	// Cancelled, until it was at the broker that doesn't have the request, too.
	peers := strings.TrimSuffix(schemas.PeerCancelWildcard, "*.*")
	for n := 0; n < 4 || n < 50 && !w.heardOn(peers); n++ {
		asked := false
		p.follow(ctx, schemas.OperationChat, chatBody(true, pace(100_000)), func(r *heard, m *nats.Msg) {
			if m.Reply != "" {
				_ = m.Respond(nil)
			}
			if r.text != "" && !asked {
				asked = true
				var done schemas.Cancelled
				if err := p.ask(schemas.OperationCancel, schemas.CancelRequest{Request: r.request}.Encode(), &done); err != nil {
					t.Errorf("cancel: %+v", err)
				}
			}
		})
	}
	s := &submitter{t, c, key, secret}
	s.accept("whole", says("whole"))
	s.done("whole", "whole")
	s.accept("broken", map[string]any{"model": "nobody-has-it"})
	s.failed("broken", schemas.CodeModelNotFound)

	// A worker dies in mid-stream, and another goes on; then the owner dies.
	running := backend.Stats().Started
	var streams sync.WaitGroup
	for range 6 {
		streams.Go(func() { wantWhole(t, client.chat(ctx, true, pace(200))) })
	}
	stack.Until(t, 30*time.Second, "streams to run", func() bool { return backend.Stats().Started >= running+6 })
	workers[0].Kill()
	streams.Wait()
	// So many at the worker that is left that it gathers frames, sooner or later.
	bundles := func() bool { return w.heardOf(schemas.IsBundle) }
	for n := 0; n < 20 && !bundles(); n++ {
		for range 100 {
			streams.Go(func() { wantWhole(t, client.chat(ctx, true, pace(100))) })
		}
		streams.Wait()
	}
	c.RestartWorker(workers[0].Dir, backend.URL).Serving()
	doomed := newClient(edges[1].BaseURL, secret)
	defer doomed.close()
	running = backend.Stats().Started
	streams.Go(func() { doomed.chat(ctx, true, pace(100_000)) })
	stack.Until(t, 30*time.Second, "the stream to run", func() bool { return backend.Stats().Started > running && backend.Stats().Active == 1 })
	edges[1].Kill()
	streams.Wait()
	stack.Until(t, 30*time.Second, "the worker to give up", func() bool { return backend.Stats().Active == 0 })
	openLedger(t, c.DatabaseURL).wantClosed(key, 30*time.Second)
	return wrong
}

// TestAsyncAPIIsValid holds the document to the official JSON Schema of AsyncAPI 3.0.
func TestAsyncAPIIsValid(t *testing.T) {
	needClients(t)
	b, err := os.ReadFile(filepath.Join(scripts, "nats/node_modules/@asyncapi/specs/schemas/3.0.0.json"))
	if err != nil {
		t.Fatal(err)
	}
	spec, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(schemas.AsyncAPI))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("asyncapi.json", spec); err != nil {
		t.Fatal(err)
	}
	schema, err := c.Compile("asyncapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(doc); err != nil {
		t.Error(err)
	}
	doc.(map[string]any)["channels"].(map[string]any)["job"].(map[string]any)["address"] = 1
	if schema.Validate(doc) == nil {
		t.Error("an address that is a number is taken for valid")
	}
}
