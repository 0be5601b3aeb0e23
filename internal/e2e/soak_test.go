package e2e

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/bus"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
	"github.com/ownllm/ownllm/worker/demo"
)

var soakTime = flag.Duration("soak", 20*time.Second, "for how long TestSoak sends requests")

// longSoak is from when on a soak is long enough to judge memory, too: before that, pools and
// tables still find their size.
const longSoak = 2 * time.Minute

// quantity is something that a process has, and that mustn't grow with the number of requests.
type quantity string

const (
	goroutines    quantity = "goroutines"
	openFiles     quantity = "open files"
	subscriptions quantity = "subscriptions"
	heap          quantity = "KiB of heap"
	resident      quantity = "MiB resident"
)

// growth bounds how a quantity may grow with 1,000 requests. What leaks one for each 1,000 has a
// slope of 1, or of half of that in a process that sees every other request, and the bound is
// well below. A slope that comes to less than slack over all that was measured is noise:
// connections to backends, one for each client at the most, and what a pool of connections to
// Postgres makes ahead for each of them. Resident memory is the Go runtime's to give back, so
// its bound is only for what isn't on its heap.
type growth struct{ slope, slack float64 }

var soakBounds = map[quantity]growth{
	goroutines:    {0.2, 40},
	openFiles:     {0.2, 20},
	subscriptions: {0.2, 12},
	heap:          {0.2, 128},
	resident:      {0.03, 16},
}

// sample is what all processes have after so many requests.
type sample struct {
	requests float64 // in thousands
	has      map[string]map[quantity]float64
}

// soak is a whole OwnLLM under as many requests as it takes.
type soak struct {
	*stack.Cluster
	backend   *stack.Backend
	processes map[string]*stack.Process
	system    *nats.Conn
	turns     []func() error
	requests  atomic.Int64
}

// soakAsk is a request that is over at once.
func soakAsk(stream bool) map[string]any {
	fields := counting(stream, 4, 0)
	delete(fields["demo"].(map[string]any), "tokens_per_second")
	return fields
}

func startSoak(t *testing.T) *soak {
	// A pool of connections to Postgres grows to its bound when it is asked much at once, which
	// may be early or late, and each of them takes more memory than is looked for.
	const fewConns = "--database-conns=4"
	s := &soak{backend: stack.StartBackend(t, demo.Options{}), Cluster: stack.StartCluster(t, fewConns)}
	edges := s.StartEdges(2, fewConns)
	s.processes = map[string]*stack.Process{"broker": s.Broker, "edge 0": edges[0].Process, "edge 1": edges[1].Process}
	for i := range 2 {
		s.processes[fmt.Sprint("worker ", i)] = s.StartWorker(s.backend.URL).Serving().Process
	}
	for _, edge := range edges {
		awaitAgents(t, edge, 2)
	}
	var err error
	if s.system, err = nats.Connect(s.NATSURL(), nats.UserInfo(bus.UserSystem, s.Token())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.system.Close)
	setPrice(t, s.Cluster, demo.ModelID, chaosPrice)
	key, secret := newKey(t, s.Cluster, books.NewKey{Concurrency: new(1000), BudgetCents: new(int64(10_000_000))})
	for i := range 12 {
		client := clientsOf(t, edges, secret)[i%2]
		s.turns = append(s.turns, func() error {
			r := client.chat(t.Context(), i%3 != 0, soakAsk(i%3 != 0))
			if r.broken != nil || r.err != nil || !r.done || r.text != numbered(4) {
				return fmt.Errorf("status %d, error %+v, broken %v, text %q", r.status, r.err, r.broken, r.text)
			}
			return nil
		})
	}
	for i := range 2 {
		p := newPublisher(t, s.NATSURL(), key, secret)
		s.turns = append(s.turns, func() error {
			if h := p.follow(t.Context(), schemas.OperationChat, chatBody(i == 0, soakAsk(i == 0)), func(*heard, *nats.Msg) {}); h.broken != nil || h.err != nil {
				return fmt.Errorf("over NATS: error %+v, broken %v", h.err, h.broken)
			}
			return nil
		})
	}
	return s
}

// run sends requests for a while, and waits until all have been answered.
func (s *soak) run(t *testing.T, within time.Duration) {
	end := time.Now().Add(within)
	var clients sync.WaitGroup
	for _, turn := range s.turns {
		clients.Go(func() {
			for time.Now().Before(end) {
				if err := turn(); err != nil {
					t.Errorf("a request failed: %v", err)
					return
				}
				s.requests.Add(1)
			}
		})
	}
	clients.Wait()
	stack.Until(t, 20*time.Second, "an empty queue", func() bool { return s.backend.Stats().Active == 0 && jobs(t, s.Cluster) == 0 })
}

// look measures all processes while nothing runs, once what a request leaves for a moment is
// gone: until they are as they were a moment ago.
func (s *soak) look(t *testing.T) sample {
	t.Helper()
	var was, is map[string]map[quantity]float64
	same := func() bool {
		for name, has := range is {
			if math.Abs(was[name][goroutines]-has[goroutines]) > 2 || math.Abs(was[name][openFiles]-has[openFiles]) > 1 {
				return false
			}
		}
		return true
	}
	for deadline := time.Now().Add(2 * time.Second); is == nil || !same() && time.Now().Before(deadline); {
		was, is = is, make(map[string]map[quantity]float64)
		for name, p := range s.processes {
			is[name] = s.measure(t, p)
		}
		is["nats-server"] = s.server(t)
	}
	return sample{float64(s.requests.Load()) / 1000, is}
}

// measure looks at one of our processes, after two collections: the first one leaves what is
// in pools.
func (s *soak) measure(t *testing.T, p *stack.Process) map[quantity]float64 {
	t.Helper()
	profiled(t, p.OpsURL+"/debug/pprof/heap?debug=1&gc=1", "# HeapAlloc = ")
	has := map[quantity]float64{heap: float64(profiled(t, p.OpsURL+"/debug/pprof/heap?debug=1&gc=1", "# HeapAlloc = ")) / 1024}
	resp, err := http.Get(p.OpsURL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	defer resp.Body.Close()
	names := map[string]quantity{"go_goroutines": goroutines, "process_open_fds": openFiles, "process_resident_memory_bytes": resident}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if q, ok := names[name]; ok {
			if has[q], err = strconv.ParseFloat(value, 64); err != nil {
				t.Fatal(err)
			}
		}
	}
	has[resident] /= 1 << 20
	if len(has) != len(names)+1 {
		t.Fatalf("%s doesn't tell %v", p.OpsURL, names)
	}
	return has
}

// server looks at nats-server.
func (s *soak) server(t *testing.T) map[quantity]float64 {
	t.Helper()
	m, err := s.system.Request("$SYS.REQ.SERVER.PING.VARZ", nil, 5*time.Second)
	var answer struct {
		Data struct {
			Mem           float64
			Connections   float64
			Subscriptions float64
		}
	}
	if err == nil {
		err = json.Unmarshal(m.Data, &answer)
	}
	if err != nil || answer.Data.Mem == 0 || answer.Data.Subscriptions == 0 {
		t.Fatalf("nats-server says %+v: %v", answer, err)
	}
	return map[quantity]float64{
		openFiles: answer.Data.Connections, subscriptions: answer.Data.Subscriptions, resident: answer.Data.Mem / (1 << 20),
	}
}

// slope is by how much y grows with x, by linear regression.
func slope(x, y []float64) float64 {
	mean := func(of []float64) float64 {
		sum := 0.0
		for _, v := range of {
			sum += v
		}
		return sum / float64(len(of))
	}
	mx, my := mean(x), mean(y)
	var xy, xx float64
	for i := range x {
		xy += (x[i] - mx) * (y[i] - my)
		xx += (x[i] - mx) * (x[i] - mx)
	}
	return xy / xx
}

// secondHalf are the samples that are judged, the second half, and how many thousand requests lie
// between the first and the last of them.
func secondHalf(samples []sample) (half []sample, requests float64) {
	half = samples[len(samples)/2:]
	return half, half[len(half)-1].requests - half[0].requests
}

// TestSoak sends requests at the highest rate that the machine allows, over HTTP and NATS, and
// looks again and again at what each process has while nothing runs. Over the second half
// nothing of it may grow with the number of requests. `make soak` does it for ten minutes, and
// for longer if these aren't requests enough to tell a leak of 1 KiB for each 1,000 from noise.
func TestSoak(t *testing.T) {
	s := startSoak(t)
	looks, enough := 8, 0.0
	if *soakTime >= longSoak {
		looks, enough = 20, 1.5*soakBounds[heap].slack
	}
	every := *soakTime / time.Duration(looks)
	var samples []sample
	began := time.Now()
	s.run(t, every)
	for {
		s.run(t, every)
		if t.Failed() {
			return
		}
		samples = append(samples, s.look(t))
		if len(samples) < looks {
			continue
		}
		if _, width := secondHalf(samples); width >= enough {
			break
		} else if len(samples) >= 3*looks {
			t.Fatalf("the second half has %.0f,000 requests, and %.0f,000 are needed to tell a leak from noise", width, enough)
		}
	}
	t.Logf("%d requests within %s", s.requests.Load(), time.Since(began).Round(time.Second))

	second, width := secondHalf(samples)
	var x []float64
	for _, sample := range second {
		x = append(x, sample.requests)
	}
	for _, name := range slices.Sorted(maps.Keys(second[0].has)) {
		for _, q := range slices.Sorted(maps.Keys(second[0].has[name])) {
			var y []float64
			for _, sample := range second {
				y = append(y, sample.has[name][q])
			}
			got, bound := slope(x, y), soakBounds[q]
			t.Logf("%-12s %-14s %8.1f at first, then %8.1f to %8.1f, slope %+.3f for each 1,000 requests", name, q, samples[0].has[name][q], y[0], y[len(y)-1], got)
			if memory := q == heap || q == resident; memory && *soakTime < longSoak {
				continue
			}
			if math.IsNaN(got) || got > bound.slope && got*width > bound.slack {
				t.Errorf("%s: %s grow by %.3f for each 1,000 requests, %.1f in all: %.1f", name, q, got, got*width, y)
			}
		}
	}
}

// TestSlope: the slope of a line is found through noise that has none.
func TestSlope(t *testing.T) {
	var x, y []float64
	for i := range 20 {
		x = append(x, float64(i))
		y = append(y, 7+0.25*float64(i)+[]float64{1, -1, -1, 1}[i%4])
	}
	if got := slope(x, y); math.Abs(got-0.25) > 0.02 {
		t.Errorf("the slope is %f", got)
	}
}
