package backend

import (
	"bufio"
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

const (
	// loadRate is the rate in bytes per second at which a model that was never loaded
	// is taken to load, after loadStart.
	loadRate  = 500e6
	loadStart = 2 * time.Second
	// leastPart is how much of a load has to be done before its pace says something.
	leastPart = 0.05
	// loadOver is the least that a load takes from here that has outlasted its estimate: a
	// second, or as much again as this part of what it took so far.
	loadOver = 0.25
)

// estimate is how long a load of the model takes: as long as the last one that was seen
// here, else as its size lets expect; 0 if nothing is known.
func (k *known) estimate(size int64) time.Duration {
	if k.loaded == 0 && size > 0 {
		return loadStart + time.Duration(float64(size)/loadRate*float64(time.Second))
	}
	return k.loaded
}

// left is how long a load takes from here: by its own pace if the server tells how much of
// it is done, else by the estimate of the whole; 0 if nothing is known. A load that has
// outlasted its estimate is taken to go on for a while.
func left(estimate, elapsed time.Duration, done float64) time.Duration {
	over := max(time.Second, time.Duration(float64(elapsed)*loadOver))
	switch {
	case done >= 1:
		return time.Second
	case done >= leastPart:
		return time.Duration(float64(elapsed) * (1 - done) / done)
	case estimate == 0:
		return 0
	}
	return max(estimate-elapsed, min(over, estimate))
}

// LoadLeft is how long a model that isn't in memory is likely to take until it is, by what
// is known right now; 0 if nothing is. percent is how much of the load is done, 0 if the
// server doesn't tell.
func (b *Backend) LoadLeft(model string) (d time.Duration, percent int) {
	id, err := b.resolve(model)
	if err != nil {
		return 0, 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	k := b.known[id]
	if k == nil {
		return 0, 0
	}
	if k.told > 0 {
		return max(k.told-time.Since(k.toldAt), time.Second), 0
	}
	began, done := b.progress(id, k)
	if began.IsZero() {
		return k.estimate(k.size), 0
	}
	return left(k.estimate(k.size), time.Since(began), done), int(done * 100)
}

// progress is when the load that runs has begun, as far as it was seen, and how much of it is
// done; zero if none runs. b.mu is held.
func (b *Backend) progress(id string, k *known) (began time.Time, done float64) {
	if l := b.loads[id]; l != nil && l.ended.IsZero() {
		return l.began, l.part
	}
	return k.loading, 0
}

// watch follows the progress of a load by the events of a llama.cpp router until ctx ends. An
// older one has no such events, and one that breaks off leaves what it said.
func (b *Backend) watch(ctx context.Context, id string) {
	req, err := b.newRequest(ctx, http.MethodGet, "/models/sse", nil)
	if err != nil {
		return
	}
	resp, err := b.transport.RoundTrip(req)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxAnswer)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data:")
		if !ok || !gjson.Valid(data) || gjson.Get(data, "model").String() != id {
			continue
		}
		if part, ok := partDone(gjson.Get(data, "data.progress")); ok {
			b.mu.Lock()
			if l := b.loads[id]; l != nil && l.ended.IsZero() {
				l.part = part
			}
			b.mu.Unlock()
		}
	}
}

// partDone reads how much of a load is done, 0 to 1, from what a router says: which of several
// stages it is in, of which each counts as much, and how far in that.
func partDone(progress gjson.Result) (float64, bool) {
	value := progress.Get("value")
	if value.Type != gjson.Number || value.Num < 0 || value.Num > 1 {
		return 0, false
	}
	stages, current := progress.Get("stages").Array(), progress.Get("current").String()
	for i, s := range stages {
		if s.String() == current {
			return (float64(i) + value.Num) / float64(len(stages)), true
		}
	}
	// An older one names one stage, and not how many there are.
	if stage := progress.Get("stage").String(); stage != "" && stage != "text_model" {
		return 0, false
	}
	return value.Num, true
}

// weighLoad lets the state of a model follow its load, whoever has started it.
func (b *Backend) weighLoad(m *schemas.Model, l listed, k *known) {
	now := time.Now()
	k.size, k.told, k.toldAt = l.size, time.Duration(l.loadMS)*time.Millisecond, now
	running := b.loads[l.id]
	if running != nil && !running.ended.IsZero() {
		if m.State == schemas.ModelCold && running.err != nil && time.Since(running.ended) < failureMemory {
			m.State, m.Detail = schemas.ModelFailed, schemas.AsError(running.err).Message
			return
		}
		running = nil
	}
	if running != nil && m.State != schemas.ModelFailed {
		m.State = schemas.ModelLoading
	}
	k.follow(m.State, running != nil, now)
	if m.State != schemas.ModelLoading && m.State != schemas.ModelCold {
		return
	}
	began, done := b.progress(l.id, k)
	m.LoadPercent = int(done * 100)
	if m.LoadMS == 0 {
		takes := k.estimate(l.size)
		if !began.IsZero() {
			takes = left(takes, now.Sub(began), done)
		}
		// Whole seconds, so that the inventory doesn't change more often than it must.
		m.LoadMS = int64((takes + time.Second - 1) / time.Second * 1000)
	}
}

// follow notes when a load begins and ends that the server has started by itself. One that was
// under way when the worker came says nothing of how long a load takes.
func (k *known) follow(state schemas.ModelState, ours bool, now time.Time) {
	switch {
	case ours || state == schemas.ModelFailed || state == schemas.ModelCold:
		k.loading, k.begun = time.Time{}, false
	case state == schemas.ModelLoading && k.loading.IsZero():
		k.loading, k.begun = now, k.state != ""
	case state == schemas.ModelReady:
		if !k.loading.IsZero() && k.begun {
			k.loaded = now.Sub(k.loading)
		}
		k.loading, k.begun = time.Time{}, false
	}
}
