package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// The doors by which requests of a chaos run come in.
const (
	doorHTTP    = "http"
	doorNATS    = "nats"
	doorDurable = "durable"
)

// told is what a client of a chaos run was told of one request.
type told struct {
	door    string
	request string
	tokens  int
	usage   int // as told; 0: it wasn't
	whole   bool
	took    time.Duration
}

// chaosLoad is mixed load: clients over HTTP, streamed and not, publishers that wait for
// their replies, and one that submits.
type chaosLoad struct {
	c          *chaos
	ledger     *ledger
	keys       map[string]schemas.KeyID // by door
	secrets    map[string]string        // of the keys
	clients    int                      // that run
	publishers []*publisher
	submitter  *publisher

	mu        sync.Mutex
	rows      map[string]int // good replies in a row, by client
	told      []told
	requests  map[string]int // by door
	retries   map[string]int
	failures  map[string]int           // by door and code
	slowest   map[string]time.Duration // by door
	wrong     []string
	submitted map[string]int // tokens of what was accepted, by id
	taken     int            // of the submissions, how many were sent
}

const chaosPrice = books.MicroCents

func newChaosLoad(t *testing.T, c *chaos) *chaosLoad {
	t.Helper()
	l := &chaosLoad{
		c: c, ledger: openLedger(t, c.DatabaseURL), keys: map[string]schemas.KeyID{}, secrets: map[string]string{}, rows: map[string]int{},
		requests: map[string]int{}, retries: map[string]int{}, failures: map[string]int{}, slowest: map[string]time.Duration{}, submitted: map[string]int{},
	}
	setPrice(t, c.Cluster, "demo", chaosPrice)
	for _, door := range []string{doorHTTP, doorNATS, doorDurable} {
		l.keys[door], l.secrets[door] = newKey(t, c.Cluster, books.NewKey{Name: door, Concurrency: new(1000), BudgetCents: new(int64(10_000_000))})
	}
	connect := func(door string, i int) *publisher {
		return newPublisher(t, c.ServerURL(i)+","+c.NATSURL(), l.keys[door], l.secrets[door],
			nats.DontRandomize(), nats.IgnoreAuthErrorAbort(), nats.ReconnectWait(100*time.Millisecond), nats.ReconnectBufSize(-1))
	}
	for i := range c.Servers {
		l.publishers = append(l.publishers, connect(doorNATS, i))
	}
	l.submitter = connect(doorDurable, 0)
	return l
}

const chaosHTTPClients = 5

// begin starts all clients. The returned function lets them finish what they have begun, and
// waits.
func (l *chaosLoad) begin(ctx context.Context) (stop func()) {
	turns := map[string]func(int) bool{doorDurable: func(int) bool { return l.submit() }}
	var clients []*client
	for i := range chaosHTTPClients {
		pair := clientsOf(l.c.t, l.c.edges, l.secret())
		clients = append(clients, pair...)
		turns[fmt.Sprint(doorHTTP, i)] = func(n int) bool { return l.overHTTP(ctx, pair, n%3 != 0) }
	}
	for i, p := range l.publishers {
		turns[fmt.Sprint(doorNATS, i)] = func(n int) bool { return l.overNATS(ctx, p, n%3 != 0) }
	}
	wait := l.loop(turns)
	return func() {
		wait()
		for _, c := range clients {
			c.close()
		}
	}
}

// loop has each client take one turn after the other, until stop is called, which waits.
func (l *chaosLoad) loop(turns map[string]func(n int) bool) (stop func()) {
	l.clients = len(turns)
	stopped := make(chan struct{})
	var running sync.WaitGroup
	for name, turn := range turns {
		running.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stopped:
					return
				default:
				}
				good := turn(n)
				l.mu.Lock()
				l.rows[name]++
				if !good {
					l.rows[name] = 0
				}
				l.mu.Unlock()
				if !good {
					time.Sleep(50 * time.Millisecond)
				}
			}
		})
	}
	return func() {
		close(stopped)
		running.Wait()
	}
}

// secret opens the door HTTP.
func (l *chaosLoad) secret() string { return l.secrets[doorHTTP] }

// chaosAsk is a request for a numbered reply of about a second.
func chaosAsk(stream bool) (fields map[string]any, tokens int) {
	tokens = 10 + rand.IntN(40)
	fields = counting(stream, tokens, 40)
	if rand.IntN(2) == 0 {
		fields = limited(fields, tokens)
	}
	return fields, tokens
}

// bad notes what mustn't happen.
func (l *chaosLoad) bad(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
}

func (l *chaosLoad) note(x told, failure string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests[x.door]++
	l.slowest[x.door] = max(l.slowest[x.door], x.took.Round(100*time.Millisecond))
	if failure != "" {
		l.failures[x.door+" "+failure]++
	}
	if x.request != "" {
		l.told = append(l.told, x)
	}
	return failure == ""
}

// failed is how often each failure came up so far.
func (l *chaosLoad) failed() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.failures)
}

func (l *chaosLoad) retried(door string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retries[door]++
}

// mayFail are the codes that somebody may be told while parts fail: never that the key, the
// model or the request is wrong.
var mayFail = map[schemas.Code]bool{
	schemas.CodeInternalError: true, schemas.CodeAgentOffline: true, schemas.CodeTunnelDown: true, schemas.CodeAgentTimeout: true,
}

// wantText checks the text of a reply: whole, or a beginning of it.
func (l *chaosLoad) wantText(who, text string, tokens int, whole bool) {
	if want := numbered(tokens); whole && text != want || !strings.HasPrefix(want, text) {
		l.bad("%s: whole %v, %d tokens asked for, text %q", who, whole, tokens, text)
	}
}

// overHTTP sends a request to one of the edges, and does as SDKs do: what isn't taken is
// tried again, and twice, here at the other edge.
func (l *chaosLoad) overHTTP(ctx context.Context, edges []*client, stream bool) bool {
	fields, tokens := chaosAsk(stream)
	first := rand.IntN(2)
	for try := 0; ; try++ {
		at := (first + try) % 2
		began := time.Now()
		patient, cancel := patience(ctx)
		r := edges[at].chat(patient, stream, fields)
		late := patient.Err() != nil
		cancel()
		who := fmt.Sprintf("request %s at edge %d, status %d", r.request(), at, r.status)
		l.wantText(who, r.text, tokens, r.done)
		failure := r.code()
		switch {
		case late:
			l.bad("%s: nothing ended it; %d tokens, %v", who, tokensOf(r.text), r.broken)
			failure = "no end"
		case r.broken != nil:
			failure = "connection lost"
			if !l.c.blame(began, time.Now(), killed(roleEdge, fmt.Sprint(roleEdge, " ", at))) {
				l.bad("%s: the connection was lost, and the edge lived: %v", who, r.broken)
			}
		case r.err != nil && !mayFail[schemas.Code(r.code())]:
			l.bad("%s: %+v", who, r.err)
		case r.err == nil && !r.done:
			l.bad("%s ended after %d tokens without a word", who, tokensOf(r.text))
			failure = "silent end"
		case r.done && r.finish == "":
			l.bad("%s is done without a finish_reason", who)
		case r.status == http.StatusServiceUnavailable && r.header.Get("Retry-After") == "":
			l.bad("%s has no Retry-After", who)
		}
		good := l.note(told{doorHTTP, r.request(), tokensOf(r.text), r.usage, r.done, time.Since(began)}, failure)
		if good || try == 2 || r.status == http.StatusOK {
			return good
		}
		l.retried(doorHTTP)
		after, _ := strconv.Atoi(r.header.Get("Retry-After"))
		time.Sleep(time.Duration(min(after, 2))*time.Second + rand.N(200*time.Millisecond))
	}
}

// natsSilence is longer than anybody is frozen or cut off.
const natsSilence = 8 * time.Second

var errSilence = errors.New("nothing has come for too long")

// overNATS sends a request as a publisher.
func (l *chaosLoad) overNATS(ctx context.Context, p *publisher, stream bool) bool {
	fields, tokens := chaosAsk(stream)
	if !stream {
		delete(fields, "stream_options")
	}
	began := time.Now()
	// Something comes every second, so whoever hears nothing has lost it.
	patient, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	silence := time.AfterFunc(natsSilence, func() { leave(errSilence) })
	defer silence.Stop()
	h := p.follow(patient, schemas.OperationChat, chatBody(stream, fields), func(*heard, *nats.Msg) { silence.Reset(natsSilence) })
	whole := h.usage != nil && h.err == nil && h.broken == nil
	text, failure := h.text, string(h.code())
	if whole && !stream {
		var v chatChunk
		if err := json.Unmarshal(h.completion, &v); err != nil || len(v.Choices) == 0 {
			l.bad("reply %s over NATS is %s: %v", h.request, h.completion, err)
		} else {
			text = v.Choices[0].Message.Content
		}
	}
	who := fmt.Sprintf("reply %s over NATS", h.request)
	l.wantText(who, text, tokens, whole)
	switch {
	case h.broken != nil:
		failure = "lost messages" // the numbers tell, or that nothing comes
		if errors.Is(h.broken, nats.ErrNoResponders) {
			failure = "no broker"
		}
		if !l.c.blame(began, time.Now(), func(s spell) bool { return s.role == roleBroker || s.role == roleServer || s.role == rolePostgres }) {
			l.bad("%s broke off while brokers and servers lived: %v", who, h.broken)
		}
	case h.err != nil && !mayFail[h.code()]:
		l.bad("%s: %+v", who, h.err)
	}
	x := told{door: doorNATS, request: string(h.request), tokens: tokensOf(text), whole: whole, took: time.Since(began)}
	if h.usage != nil {
		x.usage = h.usage.CompletionTokens
	}
	return l.note(x, failure)
}

// submit submits one request, until it is accepted, as who wants it run once has to.
func (l *chaosLoad) submit() bool {
	fields, tokens := chaosAsk(false)
	l.mu.Lock()
	l.taken++
	id := fmt.Sprint("job ", l.taken)
	l.mu.Unlock()
	payload, err := json.Marshal(map[string]any{"id": id, "request": json.RawMessage(chatBody(false, fields))})
	if err != nil {
		panic(err)
	}
	defer time.Sleep(300 * time.Millisecond)
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		o, err := l.ask(schemas.OperationSubmit, payload)
		switch {
		case err != nil || o.Error != nil && o.Error.Code == schemas.CodeInternalError:
			l.retried(doorDurable)
			continue
		case o.Kind != schemas.KindAccepted || o.ID != id:
			l.bad("submission %s: %+v, %+v", id, o, o.Error)
			return false
		}
		l.mu.Lock()
		l.submitted[id] = tokens
		l.mu.Unlock()
		return l.note(told{door: doorDurable}, "")
	}
	l.bad("nobody took submission %s", id)
	return false
}

func (l *chaosLoad) ask(operation string, payload []byte) (o outcome, err error) {
	m, err := l.submitter.nc.Request(schemas.InSubject(l.submitter.key, operation), payload, 5*time.Second)
	if err != nil {
		return o, err
	}
	return o, json.Unmarshal(m.Data, &o)
}

// awaitGood waits until each client has had some good replies in a row.
func (l *chaosLoad) awaitGood(t *testing.T, within time.Duration, why string) {
	t.Helper()
	l.mu.Lock()
	clear(l.rows)
	l.mu.Unlock()
	began := time.Now()
	took := make(map[string]time.Duration)
	stack.Until(t, within, "good replies "+why, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		for name, row := range l.rows {
			if row >= 3 && took[name] == 0 {
				took[name] = time.Since(began).Round(100 * time.Millisecond)
			}
		}
		return len(took) == l.clients
	})
	t.Logf("all clients have good replies %s, each after %v", why, took)
}

func (l *chaosLoad) report(t *testing.T) {
	t.Helper()
	t.Logf("requests %v, tried again %v, failed %v; the slowest took %v", l.requests, l.retries, l.failures, l.slowest)
	for _, w := range l.wrong {
		t.Error(w)
	}
	failed := 0
	for _, n := range l.failures {
		failed += n
	}
	if all := l.requests[doorHTTP] + l.requests[doorNATS]; failed*2 > all {
		t.Errorf("%d of %d requests failed", failed, all)
	}
}

// result waits for the end of what was submitted.
func (l *chaosLoad) result(t *testing.T, id string) (o outcome) {
	t.Helper()
	payload, err := json.Marshal(map[string]any{"id": id, "wait_seconds": 4})
	if err != nil {
		t.Fatal(err)
	}
	stack.Until(t, 120*time.Second, "the result of "+id, func() bool {
		o, err = l.ask(schemas.OperationResult, payload)
		return err == nil && o.Kind == schemas.KindResult && o.State.Ended()
	})
	return o
}

// wantSettled compares what clients were told with what the books have, and waits until
// nobody holds anything.
func (l *chaosLoad) wantSettled(t *testing.T) {
	t.Helper()
	ended := make(map[string]int)
	for id, tokens := range l.submitted {
		o := l.result(t, id)
		switch {
		case o.State == schemas.SubmissionDone:
			ended["done"]++
			l.told = append(l.told, told{doorDurable, string(o.Request), tokens, o.Usage.CompletionTokens, true, 0})
			if o.text() != numbered(tokens) {
				t.Errorf("submission %s has the text %q", id, o.text())
			}
		default:
			if ended[o.Error.Message]++; !mayFail[o.Error.Code] {
				t.Errorf("submission %s: %+v", id, o.Error)
			}
		}
		if again := l.result(t, id); again.State != o.State || again.Request != o.Request || again.Finished != o.Finished {
			t.Errorf("submission %s ended as %+v, and then as %+v", id, o, again)
		}
	}
	entries := make(map[string]entry)
	var completion, cost int64
	outcomes := make(map[string]int)
	for _, key := range l.keys {
		for id, e := range l.ledger.wantClosed(key, 60*time.Second) {
			entries[id] = e
			outcomes[e.Outcome]++
			completion, cost = completion+e.Completion, cost+e.Cost
			if want := (e.Prompt + e.Completion) * chaosPrice / 1000; e.Cost != want {
				t.Errorf("request %s costs %d, want %d: %+v", id, e.Cost, want, e)
			}
		}
	}
	for _, x := range l.told {
		e, ok := entries[x.request]
		switch {
		case !ok && x.tokens > 0:
			t.Errorf("%d tokens of a request that isn't in the ledger: %+v", x.tokens, x)
		case !ok: // it was refused
		case x.whole && e.Outcome == "done" && e.Completion != int64(x.usage):
			t.Errorf("a client was told %+v, and the ledger has %+v", x, e)
		case int64(x.tokens) > e.Completion:
			t.Errorf("a client got more than was charged: %+v, %+v", x, e)
		}
	}
	l.wantNothing(t, "an open reservation", `SELECT count(*) FROM reservations WHERE state = 'open' OR in_flight`)
	l.wantNothing(t, "a slot or money that somebody holds",
		`SELECT (SELECT coalesce(sum(in_flight), 0) FROM key_accounts) + (SELECT coalesce(sum(reserved), 0) FROM budgets)`)
	l.wantNothing(t, "a row in the ledger of a request that wasn't admitted, or isn't ended",
		`SELECT count(*) FROM ledger l WHERE NOT EXISTS (SELECT FROM reservations r WHERE r.id = l.request_id AND r.state <> 'open')`)
	l.wantNothing(t, "a request that expired without its row in the ledger",
		`SELECT count(*) FROM reservations r WHERE r.state = 'expired' AND NOT EXISTS (SELECT FROM ledger l WHERE l.request_id = r.id)`)
	l.wantNothing(t, "a submission that is still queued", `SELECT count(*) FROM submission_queue`)
	t.Logf("the ledger has %d requests, %d tokens, %d micro-cents; ends: %v; submissions: %v", len(entries), completion, cost, outcomes, ended)
}

func (l *chaosLoad) wantNothing(t *testing.T, what, query string) {
	t.Helper()
	var n int64
	if err := l.ledger.pool.QueryRow(t.Context(), query).Scan(&n); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if n != 0 {
		t.Errorf("%d times there is %s", n, what)
	}
}

// profiled reads a number out of a profile.
func profiled(t *testing.T, url, prefix string) int {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	found := -1
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), prefix); ok {
			if found, err = strconv.Atoi(strings.Fields(rest)[0]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if lines.Err() != nil || found < 0 {
		t.Fatalf("%s doesn't tell %q: %v", url, prefix, lines.Err())
	}
	return found
}
