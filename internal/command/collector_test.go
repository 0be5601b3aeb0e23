package command

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestCollectorPercent(t *testing.T) {
	for live, want := range map[uint64]int{
		0: 400, 1 << 20: 400, 51 << 20: 400, 64 << 20: 300, 128 << 20: 100, 160 << 20: 60,
		200 << 20: 28, 250 << 20: 25, 256 << 20: 25, 8 << 30: 25,
	} {
		if got := collectorPercent(live); got != want {
			t.Errorf("with %d MB in use it is %d, want %d", live>>20, got, want)
		}
	}
}

// The collector is tuned anew when the heap has grown, and when it has shrunk again.
func TestTuneCollector(t *testing.T) {
	t.Setenv("GOGC", "")
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	tuneCollector()
	percent := func() int {
		p := debug.SetGCPercent(100)
		debug.SetGCPercent(p)
		return p
	}
	await := func(what string, ok func(int) bool) {
		t.Helper()
		deadline := time.Now().Add(20 * time.Second)
		for !ok(percent()) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: it is still %d", what, percent())
			}
			runtime.GC() // its finalizers run soon after
		}
	}
	if got := percent(); got != collectorMost {
		t.Fatalf("it begins with %d", got)
	}
	ballast := make([]byte, 200<<20)
	await("with 200 MB in use", func(p int) bool { return p <= 30 })
	runtime.KeepAlive(ballast)
	ballast = nil
	await("after that", func(p int) bool { return p == collectorMost })
	_ = ballast
}
