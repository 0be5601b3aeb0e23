package collector

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestPercent(t *testing.T) {
	for _, tt := range []struct {
		live, beside uint64
		want         int
	}{
		{0, 0, 400}, {1 << 20, 0, 400}, {40 << 20, 0, 400}, {50 << 20, 0, 300}, {100 << 20, 0, 100}, {125 << 20, 0, 60},
		{156 << 20, 0, 28}, {195 << 20, 0, 20}, {200 << 20, 0, 20}, {8 << 30, 0, 20},
		{0, 1 << 20, 400}, {40 << 20, 10 << 20, 320}, {100 << 20, 25 << 20, 80}, {200 << 20, 200 << 20, 20}, {8 << 30, 8 << 30, 20},
	} {
		if got := percentFor(tt.live, tt.beside); got != tt.want {
			t.Errorf("with %d MB in use, and %d beside, it is %d, want %d", tt.live>>20, tt.beside>>20, got, tt.want)
		}
	}
}

// The collector is tuned anew when the heap has grown, and when it has shrunk again.
func TestTune(t *testing.T) {
	t.Setenv("GOGC", "")
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	Tune()
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
	if got := percent(); got != most {
		t.Fatalf("it begins with %d", got)
	}
	ballast := make([]byte, 200<<20)
	await("with 200 MB in use", func(p int) bool { return p <= 30 })
	runtime.KeepAlive(ballast)
	ballast = nil
	await("after that", func(p int) bool { return p == most })
	_ = ballast
}
