package edge

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/time/rate"
	"pgregory.net/rapid"
)

var epoch = time.Unix(1_800_000_000, 0)

func TestFailuresAllowance(t *testing.T) {
	f := newFailures(2, 5)
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	if f.exhausted(a, epoch) {
		t.Error("exhausted before the first failure")
	}
	for i := range 5 {
		if f.exhausted(a, epoch) || !f.allow(a, epoch) {
			t.Fatalf("failure %d of 5 is one too many", i+1)
		}
	}
	if !f.exhausted(a, epoch) || f.allow(a, epoch) {
		t.Error("a sixth failure is allowed")
	}
	if f.exhausted(b, epoch) || !f.allow(b, epoch) {
		t.Error("another address pays for it")
	}
	soon := epoch.Add(400 * time.Millisecond)
	if !f.exhausted(a, soon) || f.allow(a, soon) {
		t.Error("allowed before the allowance has refilled by one")
	}
	later := epoch.Add(500 * time.Millisecond)
	if f.exhausted(a, later) || !f.allow(a, later) || f.allow(a, later) {
		t.Error("two a second should have refilled one")
	}
}

func TestFailuresCountNetworks(t *testing.T) {
	same := func(x, y string) bool {
		f := newFailures(1, 1)
		f.allow(netip.MustParseAddr(x), epoch)
		return f.exhausted(netip.MustParseAddr(y), epoch)
	}
	for _, test := range []struct {
		x, y string
		same bool
	}{
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"fe80::1%eth0", "fe80::2%eth1", true},
	} {
		if got := same(test.x, test.y); got != test.same {
			t.Errorf("%s and %s: counted together is %v", test.x, test.y, got)
		}
	}
	// No address at all has an allowance, too.
	f := newFailures(1, 1)
	if !f.allow(netip.Addr{}, epoch) || f.allow(netip.Addr{}, epoch) {
		t.Error("no address: wrong allowance")
	}
}

// Forgetting addresses must not show: the answers are those of limiters that are kept
// for ever.
func TestFailuresForgetOnlyWhatHasRefilled(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		perSecond := rapid.Float64Range(0.5, 50).Draw(t, "per second")
		burst := rapid.IntRange(1, 20).Draw(t, "burst")
		f := newFailures(perSecond, burst)
		model := make(map[netip.Addr]*rate.Limiter)
		now := epoch
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(2*f.turn)).Draw(t, "wait")))
			a := netip.AddrFrom4([4]byte{192, 0, 2, rapid.Byte().Draw(t, "address") % 4})
			l := model[a]
			if l == nil {
				l = rate.NewLimiter(rate.Limit(perSecond), burst)
				model[a] = l
			}
			if rapid.Bool().Draw(t, "ask only") {
				if got, want := f.exhausted(a, now), l.TokensAt(now) < 1; got != want {
					t.Fatalf("exhausted is %v, want %v", got, want)
				}
				continue
			}
			if got, want := f.allow(a, now), l.AllowN(now, 1); got != want {
				t.Fatalf("allow is %v, want %v", got, want)
			}
		}
	})
}

func TestFailuresMemoryIsBounded(t *testing.T) {
	f := newFailures(1, 1000)
	var b [4]byte
	for i := range uint32(3*maxFailing + 10) {
		binary.BigEndian.PutUint32(b[:], i)
		f.allow(netip.AddrFrom4(b), epoch)
	}
	if n := len(f.now) + len(f.before); n > 2*maxFailing {
		t.Errorf("%d addresses are kept", n)
	}
	for i := range 10 {
		now := epoch.Add(time.Duration(i) * 2 * f.turn)
		f.allow(netip.AddrFrom4(b), now)
	}
	if n := len(f.now) + len(f.before); n > 2 {
		t.Errorf("%d addresses are kept after all have refilled", n)
	}
}
