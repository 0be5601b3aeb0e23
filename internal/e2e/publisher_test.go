package e2e

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/ownllm/ownllm/broker/apikey"
	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/broker/credential"
	"github.com/ownllm/ownllm/internal/stack"
	"github.com/ownllm/ownllm/schemas"
)

// busClient is a client of the bus, which comes back as long as it is let in.
type busClient struct {
	*nats.Conn
	lost   chan time.Time // each loss of its connection
	closed chan error     // why it has given up
}

// dialKey connects with nothing but a key, to one of the servers.
func dialKey(t *testing.T, url string, key apikey.Key) *busClient {
	t.Helper()
	return dial(t, url, nats.Token(key.Reveal()))
}

func dial(t *testing.T, url string, who nats.Option) *busClient {
	t.Helper()
	p := &busClient{lost: make(chan time.Time, 64), closed: make(chan error, 1)}
	p.Conn = connect(t, url, who, nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond),
		nats.DisconnectErrHandler(func(*nats.Conn, error) { p.lost <- time.Now() }),
		nats.ClosedHandler(func(nc *nats.Conn) { p.closed <- nc.LastError() }))
	t.Cleanup(p.Close)
	return p
}

// wantCut waits until the publisher has lost its connection, and returns how long after at
// that was. It can't come back.
func (p *busClient) wantCut(t *testing.T, at time.Time) time.Duration {
	t.Helper()
	select {
	case lost := <-p.lost:
		select {
		case err := <-p.closed:
			if !errors.Is(err, nats.ErrAuthorization) {
				t.Errorf("it gives up with %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("it is not told that it isn't let in; %v", p.LastError())
		}
		return lost.Sub(at)
	case <-time.After(20 * time.Second):
		t.Fatal("it is still connected")
	}
	return 0
}

// TestKeysAreCutOff takes keys away in every way, while publishers are connected: at the
// embedded server of `ownllm up`, and at an external one.
func TestKeysAreCutOff(t *testing.T) {
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		up := stack.StartUp(t, t.TempDir())
		store, err := books.Open(t.Context(), books.Config{URL: up.DatabaseURL})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		cutOff(t, store, up.NATSURL)
	})
	t.Run("external", func(t *testing.T) {
		t.Parallel()
		c := stack.StartCluster(t)
		cutOff(t, c.Books, c.NATSURL())
		t.Run("while no broker runs", func(t *testing.T) { cutAtStart(t, c) })
	})
}

func cutOff(t *testing.T, store *books.Store, url string) {
	ctx := t.Context()
	const slack = 1500 * time.Millisecond // for a busy machine, on top of the second
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := store.CreateTenant(ctx, books.NewTenant{Slug: "doomed"})
	must(err)
	user, err := store.CreateUser(ctx, books.NewUser{Tenant: "doomed", Email: "ada@example.com"})
	must(err)
	colleague, err := store.CreateUser(ctx, books.NewUser{Tenant: "doomed", Email: "bob@example.com"})
	must(err)
	_, err = store.CreateTenant(ctx, books.NewTenant{Slug: "bystander"})
	must(err)
	eve, err := store.CreateUser(ctx, books.NewUser{Tenant: "bystander", Email: "eve@example.com"})
	must(err)
	issue := func(u books.User, ttl *time.Duration) (books.Key, apikey.Key) {
		t.Helper()
		k, secret, err := store.CreateKey(ctx, books.NewKey{Tenant: string(u.Tenant), User: string(u.ID), TTL: ttl})
		must(err)
		return k, secret
	}
	_, secret := issue(eve, nil)
	bystander := dialKey(t, url, secret)
	for _, change := range []struct {
		name  string
		delay time.Duration // of the end, after the change
		all   bool          // a colleague's key ends, too
		do    func(*testing.T, books.Key) error
		undo  func() error
	}{
		{"revocation", 0, false, func(_ *testing.T, k books.Key) error { _, err := store.RevokeKey(ctx, k.ID); return err }, nil},
		{"rotation without an overlap", 0, false, func(_ *testing.T, k books.Key) error {
			_, _, err := store.RotateKey(ctx, k.ID, books.Rotation{})
			return err
		}, nil},
		{"rotation", 3 * time.Second, false, func(t *testing.T, k books.Key) error {
			_, fresh, err := store.RotateKey(ctx, k.ID, books.Rotation{Overlap: 3 * time.Second})
			if err == nil {
				with := dialKey(t, url, fresh)
				t.Cleanup(func() {
					if len(with.lost) > 0 {
						t.Error("the new secret's connection was cut off")
					}
				})
			}
			return err
		}, nil},
		{
			"deactivation", 0, false,
			func(*testing.T, books.Key) error {
				_, err := store.SetUserState(ctx, user.ID, books.UserDeactivated)
				return err
			},
			func() error { _, err := store.SetUserState(ctx, user.ID, books.UserActive); return err },
		},
		{
			"suspension", 0, true,
			func(*testing.T, books.Key) error {
				_, err := store.SetTenantState(ctx, "doomed", books.TenantSuspended)
				return err
			},
			func() error { _, err := store.SetTenantState(ctx, "doomed", books.TenantActive); return err },
		},
	} {
		t.Run(change.name, func(t *testing.T) {
			k, secret := issue(user, nil)
			_, colleagues := issue(colleague, nil)
			cut := []*busClient{dialKey(t, url, secret), dialKey(t, url, secret)}
			other := dialKey(t, url, colleagues)
			if change.all {
				cut = append(cut, other)
			}
			at := time.Now().Add(change.delay)
			must(change.do(t, k))
			var last time.Duration
			for _, p := range cut {
				took := p.wantCut(t, at)
				if took < -100*time.Millisecond || took > time.Second+slack {
					t.Errorf("cut off %s after the end", took)
				}
				last = max(last, took)
			}
			if !change.all && len(other.lost) > 0 {
				t.Error("a colleague was cut off")
			}
			t.Logf("cut off %s after the end", last)
			if change.undo != nil {
				must(change.undo())
				// What is valid again lets in again.
				stack.Until(t, 30*time.Second, "the way back", func() bool {
					nc, err := nats.Connect(url, nats.Token(secret.Reveal()))
					if err == nil {
						nc.Close()
					}
					return err == nil
				})
			}
		})
	}
	t.Run("expiry", func(t *testing.T) {
		began := time.Now()
		_, secret := issue(user, new(5*time.Second))
		took := dialKey(t, url, secret).wantCut(t, began.Add(5*time.Second))
		if took < -100*time.Millisecond || took > time.Second+slack {
			t.Errorf("cut off %s after the end", took)
		}
		t.Logf("cut off %s after the end", took)
	})
	if len(bystander.lost) > 0 || !bystander.IsConnected() {
		t.Error("a bystander was cut off")
	}
}

// cutAtStart: whoever loses its right while no broker runs is cut off when one does.
func cutAtStart(t *testing.T, c *stack.Cluster) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	k, secret, err := c.Books.CreateKey(ctx, books.NewKey{Tenant: string(c.Tenant.ID), User: string(c.User.ID)})
	if err != nil {
		t.Fatal(err)
	}
	machine := credential.NewAgent()
	agent, err := c.Books.AddAgent(ctx, string(c.Tenant.ID), schemas.NewAgentID(), "test", machine)
	if err != nil {
		t.Fatal(err)
	}
	gone := dialKey(t, c.NATSURL(), secret)
	stays := dialKey(t, c.NATSURL(), c.Key)
	worker := dial(t, c.NATSURL(), nats.UserInfo(string(agent.ID), machine.Reveal()))
	c.Broker.Kill()
	if _, err := c.Books.RevokeKey(ctx, k.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Books.RemoveAgent(ctx, agent.ID); err != nil {
		t.Fatal(err)
	}
	if len(gone.lost)+len(worker.lost) > 0 {
		t.Fatal("somebody cuts without a broker")
	}
	c.StartBroker()
	up := time.Now()
	t.Logf("a publisher and an agent were cut off %s and %s after the broker was up", gone.wantCut(t, up), worker.wantCut(t, up))
	if len(stays.lost) > 0 {
		t.Error("another was cut off")
	}
}
