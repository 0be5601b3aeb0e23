package quota_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/quota"
	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/schemas"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// fake is books that answer as a test wants.
type fake struct {
	mu    sync.Mutex
	turns []books.Turn
	lease books.Lease
	err   error // of every call
	held  int   // leases that were given back
	// hang holds up renewals, whatever their context says.
	hang chan struct{}
	// take answers a turn, if it isn't nil.
	take func(books.Turn) (books.Outcomes, error)
}

func (f *fake) Turn(_ context.Context, turn books.Turn) (books.Outcomes, error) {
	f.mu.Lock()
	f.turns = append(f.turns, turn)
	err, take := f.err, f.take
	f.mu.Unlock()
	if err != nil {
		return books.Outcomes{}, err
	}
	if take != nil {
		return take(turn)
	}
	return yes(turn), nil
}

// yes lets everybody in.
func yes(turn books.Turn) (out books.Outcomes) {
	for range turn.Settle {
		out.Settled = append(out.Settled, books.StateOpen)
	}
	for _, a := range turn.Alter {
		out.Altered = append(out.Altered, books.Altered{State: books.StateOpen, Limit: a.Limit})
	}
	for _, a := range turn.Admit {
		out.Admit = append(out.Admit, books.Decision{Limit: max(a.Limit, 7), Price: 1, Slots: 32, SlotsFree: 31})
	}
	return out
}

func (f *fake) RenewLease(_ context.Context, owner schemas.OwnerID, _ time.Duration) (books.Lease, error) {
	f.mu.Lock()
	hang := f.hang
	f.mu.Unlock()
	if hang != nil {
		<-hang
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lease.Owner = owner
	return f.lease, f.err
}

func (f *fake) Standing(context.Context, schemas.KeyID, string) (books.Standing, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return books.Standing{Slots: 32, SlotsFree: 31}, f.err
}

func (f *fake) EndLease(context.Context, books.Lease) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held--
	return f.err
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) seen() []books.Turn {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]books.Turn(nil), f.turns...)
}

// start runs a gate until the test ends, or until the function that it returns is
// called, which waits.
func start(t testing.TB, b quota.Books, cfg quota.Config) (g *quota.Gate, stop func()) {
	t.Helper()
	g = quota.New(b, cfg, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := g.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	for !g.Ready() {
		time.Sleep(time.Millisecond)
	}
	return g, stop
}

func ask(key schemas.KeyID) quota.Ask {
	return quota.Ask{Request: schemas.NewRequestID(), Tenant: "ten_1", Key: key, Model: "m", Prompt: 1, Limit: 1, Timeout: time.Minute}
}
