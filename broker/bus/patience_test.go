package bus

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// What a cluster says while it starts, or has lost a server, passes; what is amiss with it, or
// with what is asked of it, doesn't.
func TestPatience(t *testing.T) {
	refused := func(code jetstream.ErrorCode, text string) error {
		return &jetstream.APIError{Code: 400, ErrorCode: code, Description: text}
	}
	for name, tc := range map[string]struct {
		err    error
		passes bool
	}{
		"no answer":           {context.DeadlineExceeded, true},
		"nobody listens":      {nats.ErrNoResponders, true},
		"no leader":           {refused(10009, "JetStream not the leader"), true},
		"a server is away":    {refused(10005, "no suitable peers for placement, peer offline"), true},
		"too few servers":     {refused(10005, "no suitable peers for placement"), false},
		"no room":             {refused(10005, "no suitable peers for placement, insufficient storage"), false},
		"no such cluster":     {refused(10074, "replicas > 1 not supported in non-clustered mode"), false},
		"taken back":          {ErrMoreReplicas, false},
		"anything unforeseen": {errors.New("unforeseen"), false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				asked := 0
				err := patiently(ctx, func(context.Context) error {
					if asked++; asked < 4 {
						return tc.err
					}
					return nil
				})
				if tc.passes && (err != nil || asked != 4) || !tc.passes && (!errors.Is(err, tc.err) || asked != 1) {
					t.Errorf("asked %d times, %v", asked, err)
				}
				asked = -1000
				began := time.Now()
				if err := patiently(ctx, func(context.Context) error { asked++; return tc.err }); !errors.Is(err, tc.err) {
					t.Errorf("in vain: %v", err)
				}
				if took := time.Since(began); tc.passes && took < 50*time.Second || !tc.passes && took != 0 {
					t.Errorf("it was tried for %s", took)
				}
			})
		})
	}
}
