package e2e

import (
	"bufio"
	"context"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/worker/demo"
)

// measured is the sum of a metric over all of its series whose labels contain a text, and how
// many series these are.
func measured(t *testing.T, opsURL, name, label string) (sum float64, series int) {
	t.Helper()
	resp, err := http.Get(opsURL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		line := lines.Text()
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != '{' && rest[0] != ' ' || !strings.Contains(rest, label) {
			continue
		}
		n, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		series++
		sum += n
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return sum, series
}

// taken is how many tokens of replies an owner, by the address of its metrics, has taken in
// since its start.
func taken(t *testing.T, opsURL string) (tokens int64) {
	t.Helper()
	sum, series := measured(t, opsURL, "gen_ai_client_token_usage_sum", `="output"`)
	if series == 0 {
		t.Fatal("the metrics don't tell tokens")
	}
	return int64(sum)
}

// TestEveryTokenIsAccountedFor mixes requests that end in every way. The ledger has what
// the edges took in, to the token, and nothing is held at the end.
func TestEveryTokenIsAccountedFor(t *testing.T) {
	c := startThreeEdges(t, "--idle-timeout", "1s", "--first-token-timeout", "1500ms")
	setPrice(t, c.Cluster, demo.ModelID, books.MicroCents)
	key, secret := newKey(t, c.Cluster, books.NewKey{BudgetCents: new(int64(1_000_000)), Concurrency: new(1000)})
	clients := clientsOf(t, c.edges, secret)
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	before := c.backend.Stats()
	faults := []map[string]any{
		nil, nil, nil, {"tokens_per_chunk": 7}, {"no_usage": true}, {"reasoning_tokens": 5}, {"split_utf8": true},
		{"die_after": 20}, {"error_after": 20}, {"end_after": 20}, {"garbage_after": 20}, {"stall_after": 20},
		{"die_after": 0}, {"status": 500}, {"status": 400}, {"stall_after": 0},
	}
	const parallel = 24
	type counted struct {
		reply
		exact bool // the backend tells its tokens, one by one or in the end
	}
	all := make([][]counted, parallel)
	together(parallel, func(i int) reply {
		for n := range count(20, 200) {
			fault := map[string]any{"tokens_per_second": 400}
			for k, v := range faults[rand.IntN(len(faults))] {
				fault[k] = v
			}
			stream := rand.IntN(3) > 0
			if fault["stall_after"] != nil && (n%10 != 0 || !stream) {
				continue // takes its time, or for ever: only a stream is known to stall
			}
			fields := priced(t, 10+rand.IntN(80), fault)
			switch rand.IntN(4) {
			case 0:
				fields = limited(fields, 1+rand.IntN(90))
			case 1:
				fields["stream_options"] = map[string]any{"include_usage": true}
			}
			if !stream {
				delete(fields, "stream_options")
			}
			patient, leave := ctx, func() {}
			if rand.IntN(4) == 0 {
				patient, leave = context.WithTimeout(ctx, rand.N(200*time.Millisecond))
			}
			r := clients[(i+n)%3].chat(patient, stream, fields)
			if r.broken != nil && patient.Err() == nil || ctx.Err() != nil {
				t.Errorf("%v, stream %v: %v; %d tokens, %v", fields, stream, r.broken, tokensOf(r.text), r.header)
			}
			all[i] = append(all[i], counted{r, fault["no_usage"] == nil && fault["tokens_per_chunk"] == nil})
			leave()
		}
		return reply{}
	})

	stack.Until(t, 30*time.Second, "the backend to be idle", func() bool { return c.backend.Stats().Active == 0 })
	entries := c.ledger.wantClosed(key, 30*time.Second)
	outcomes := make(map[string]int)
	var charged, edges int64
	for _, e := range entries {
		outcomes[e.Outcome]++
		charged += e.Completion
	}
	stack.Until(t, 30*time.Second, "the edges to have counted", func() bool { // which they do after the books
		edges = 0
		for _, e := range c.edges {
			edges += taken(t, e.OpsURL)
		}
		return edges >= charged
	})
	if charged != edges {
		t.Errorf("the ledger has %d tokens, and the edges took in %d", charged, edges)
	}
	if generated := c.backend.Stats().Tokens - before.Tokens; charged > generated {
		t.Errorf("the ledger has %d tokens, and the backend generated %d", charged, generated)
	}
	requests, told := 0, 0
	for _, r := range slices.Concat(all...) {
		requests++
		if r.request() == "" {
			continue // its client left before there was a status
		}
		e, ok := entries[r.request()]
		switch {
		case !ok:
			t.Errorf("request %s, of status %d and error %+v, isn't in the ledger", r.request(), r.status, r.err)
		case r.usage > 0 && e.Completion != int64(r.usage):
			t.Errorf("a client was told of %d tokens, and the ledger has %+v", r.usage, e)
		case r.exact && int64(tokensOf(r.text)) > e.Completion:
			t.Errorf("a client got %d tokens, and the ledger has %+v", tokensOf(r.text), e)
		case r.done && e.Outcome != "done", r.err != nil && e.Outcome != "error":
			t.Errorf("a reply with done %v and error %+v is in the ledger as %+v", r.done, r.err, e)
		case r.status != http.StatusOK && e.Cost != 0:
			t.Errorf("an error with status %d costs: %+v", r.status, e)
		}
		if r.usage > 0 {
			told++
		}
	}
	if told == 0 || outcomes["done"] == 0 || outcomes["error"] == 0 || outcomes["cancelled"] == 0 {
		t.Errorf("some ends didn't come: %v, %d told", outcomes, told)
	}
	t.Logf("%d requests, in the ledger: %v with %d tokens", requests, outcomes, charged)
}
