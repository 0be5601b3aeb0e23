package books_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// A request that has a turn to itself gets what it would get among others, and leaves the same
// behind.
func TestOneIsAsMany(t *testing.T) {
	s := open(t)
	now := time.Now()
	s.SetClock(func() time.Time { return now })
	other := newClient(t, s, limits{concurrency: 1_000_000, qps: 1_000_000})
	for name, l := range map[string]limits{
		"budget":    {cents: 2, concurrency: 100, qps: 100_000},
		"slots":     {concurrency: 3, qps: 100_000},
		"rate":      {cents: 100, concurrency: 100, qps: 4},
		"no bounds": {concurrency: 1000, qps: 100_000},
	} {
		t.Run(name, func(t *testing.T) {
			one, many := newClient(t, s, l), newClient(t, s, l)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 0))
			var asks [2][]books.Ask
			for n := range 60 {
				var turns [2]books.Turn
				again, which, what := r.IntN(8) == 0, r.IntN(n+1), r.IntN(6)
				if n == 50 {
					now = now.AddDate(0, 1, 0)
				}
				prompt, limit := r.Int64N(400), r.Int64N(3)*r.Int64N(400)
				settled := books.Settlement{
					Completion: r.Int64N(500), Outcome: []books.Outcome{books.OutcomeDone, books.OutcomeError, books.OutcomeVoid, books.OutcomeCancelled}[r.IntN(4)],
				}
				if r.IntN(2) == 0 {
					settled.Prompt = new(r.Int64N(400))
				}
				for i, c := range []*client{one, many} {
					a := c.ask(prompt, limit)
					x := &turns[i]
					settles := what < 3 && len(asks[i]) > 0
					if settles {
						settled.Request, settled.Key = asks[i][which%len(asks[i])].Request, c.key.ID
						if again {
							settled.Request = schemas.NewRequestID()
						}
						x.Settle = append(x.Settle, settled)
					}
					if !settles || what > 0 {
						if again && len(asks[i]) > 0 {
							a = asks[i][which%len(asks[i])]
						}
						asks[i] = append(asks[i], a)
						x.Admit, x.Lease = append(x.Admit, a), c.lease
						if n == 40 {
							x.Lease.Epoch--
						}
					}
				}
				x := &turns[1]
				if len(x.Settle) > 0 {
					x.Settle = append(x.Settle, books.Settlement{Request: schemas.NewRequestID(), Key: other.key.ID, Outcome: books.OutcomeDone})
				}
				if len(x.Admit) > 0 {
					x.Admit = append(x.Admit, other.ask(1, 1))
				}
				var foreseen []books.Decision
				if early := r.IntN(2) == 0 && len(turns[0].Admit) > 0; early {
					turns[0].Foreseen = func(d books.Decision) { foreseen = append(foreseen, d) }
				}
				got, err := s.Turn(t.Context(), turns[0])
				one.must(err)
				admitted := slices.DeleteFunc(slices.Clone(got.Admit), func(d books.Decision) bool { return d.Reason != books.Admitted })
				if diff := cmp.Diff(admitted, foreseen, cmpopts.EquateEmpty()); turns[0].Foreseen != nil && diff != "" {
					t.Fatalf("step %d, %+v (-decided +foreseen):\n%s", n, turns[0], diff)
				}
				turns[0].Foreseen = nil
				want, err := s.Turn(t.Context(), turns[1])
				many.must(err)
				want.Settled, want.Admit = want.Settled[:len(got.Settled)], want.Admit[:len(got.Admit)]
				if diff := cmp.Diff(want, got); diff != "" {
					t.Fatalf("step %d, %+v (-many +one):\n%s", n, turns[0], diff)
				}
				left := func(c *client) string {
					text, err := books.Query[string](t.Context(), s, `SELECT jsonb_build_array(
						(SELECT to_jsonb(a) - 'key_id' FROM key_accounts a WHERE a.key_id = $1),
						(SELECT jsonb_agg(to_jsonb(b) - 'key_id' ORDER BY b.month) FROM budgets b WHERE b.key_id = $1),
						(SELECT to_jsonb(b) - 'tenant_id' FROM tenant_buckets b WHERE b.tenant_id = $2),
						(SELECT jsonb_agg(to_jsonb(r) - '{id,key_id,tenant_id,user_id,owner_id,epoch}'::text[] ORDER BY r.id) FROM reservations r WHERE r.key_id = $1),
						(SELECT jsonb_agg(to_jsonb(l) - '{request_id,key_id,tenant_id,user_id}'::text[] ORDER BY l.request_id) FROM ledger l WHERE l.key_id = $1))::text`,
						c.key.ID, c.tenant.ID)
					c.must(err)
					return text
				}
				if diff := cmp.Diff(left(many), left(one)); diff != "" {
					t.Fatalf("step %d leaves, after %+v (-many +one):\n%s", n, turns[0], diff)
				}
			}
		})
	}
}

// What a turn has decided is told before it is written, let alone committed, and may come to nothing.
func TestForeseen(t *testing.T) {
	s := open(t)
	c := newClient(t, s, limits{cents: 2, concurrency: 100, qps: 1000})
	c.must(s.Exec(t.Context(), `
		CREATE TABLE told (may boolean);
		CREATE FUNCTION once_told() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			WHILE NOT EXISTS (SELECT FROM told) LOOP PERFORM pg_sleep(0.01); END LOOP;
			IF NOT (SELECT bool_and(may) FROM told) THEN RAISE 'no'; END IF;
			RETURN NEW;
		END $$`))
	known := func(a books.Ask) (n int64) {
		n, err := books.Query[int64](t.Context(), s, `SELECT count(*) FROM reservations WHERE id = $1`, a.Request)
		c.must(err)
		return n
	}
	for _, until := range []string{
		`CREATE TRIGGER once_told BEFORE INSERT ON reservations FOR EACH ROW EXECUTE FUNCTION once_told()`,
		`CREATE TRIGGER once_told BEFORE UPDATE ON tenant_buckets FOR EACH ROW EXECUTE FUNCTION once_told()`,
		`CREATE CONSTRAINT TRIGGER once_told AFTER INSERT ON reservations DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION once_told()`,
	} {
		c.must(s.Exec(t.Context(), `DROP TRIGGER IF EXISTS once_told ON reservations; DROP TRIGGER IF EXISTS once_told ON tenant_buckets; `+until))
		for _, may := range []bool{false, true} {
			c.must(s.Exec(t.Context(), `TRUNCATE told`))
			a := c.ask(1, 10)
			calls := 0
			out, err := s.Turn(t.Context(), books.Turn{Admit: []books.Ask{a}, Lease: c.lease, Foreseen: func(d books.Decision) {
				calls++
				if d.Reason != books.Admitted || d.Limit != 10 {
					t.Errorf("foreseen is %+v", d)
				}
				if known(a) != 0 {
					t.Error("it was told after the commit")
				}
				c.must(s.Exec(t.Context(), `INSERT INTO told VALUES ($1)`, may))
			}})
			if calls != 1 || (err == nil) != may || known(a) != int64(len(out.Admit)) {
				t.Errorf("%s: may be: %t; told %d times, %d known, and the turn is %+v, %v", until, may, calls, known(a), out, err)
			}
		}
	}
}

// A slot that goes from one request to the next in one turn is a release, too, for whoever
// waits for one: it isn't passed over in silence.
func TestSlotIsPassedOn(t *testing.T) {
	c := newClient(t, open(t), limits{concurrency: 2, qps: 1000})
	woken := listen(t, c.s)
	last := c.ask(1, 1)
	c.admit(last)
	pass := func() {
		t.Helper()
		next := c.ask(1, 1)
		out, err := c.s.Turn(t.Context(), books.Turn{
			Settle: []books.Settlement{{Request: last.Request, Key: c.key.ID, Completion: 1, Outcome: books.OutcomeDone}},
			Admit:  []books.Ask{next}, Lease: c.lease,
		})
		c.must(err)
		if out.Settled[0] != books.StateOpen || out.Admit[0].Reason != books.Admitted {
			t.Errorf("the slot is passed on by %+v", out)
		}
		last = next
	}
	pass()
	c.submit("1")
	waiting := c.claim(1)
	wantClaims(t, waiting, "1")
	c.admit(c.ask(1, 1)) // which gets ahead of it
	if !c.giveBack(books.Return{Claim: &waiting[0], For: books.WaitsForSlot, Code: schemas.CodeConcurrencyLimit, Pause: time.Hour}) {
		t.Fatal("the claim was somebody else's")
	}
	drain(woken)
	pass()
	await(t, woken)
	c.settle(last, 1, 1, books.OutcomeDone)
	wantClaims(t, c.claim(1), "1")
}
