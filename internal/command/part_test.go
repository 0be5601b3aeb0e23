package command

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// Parts that are together drain at the same time, and one that fails stops the others.
func TestTogether(t *testing.T) {
	met := make(chan struct{})
	meet := func(ctx context.Context) error {
		<-ctx.Done()
		select { // the other one has to be here, too
		case met <- struct{}{}:
		case <-met:
		case <-time.After(10 * time.Second):
			return errors.New("alone")
		}
		return nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	both := together(part{"one", meet}, part{"two", meet})
	if err := both.run(ctx); err != nil || both.name != "one and two" {
		t.Errorf("%s: %v", both.name, err)
	}
	waits := part{"waits", func(ctx context.Context) error { <-ctx.Done(); return nil }}
	broken := errors.New("broken")
	for want, p := range map[string]part{
		"broken":            {"fails", func(context.Context) error { return broken }},
		"ends has stopped ": {"ends", func(context.Context) error { return nil }},
	} {
		if err := together(waits, p).run(t.Context()); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
