// Package collector tunes the collector of garbage for programs that keep little and pass on
// much.
package collector

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

// How much the heap may grow between two collections. With Go's default of 100 percent a
// role would collect all the time, to save some megabytes. But one that holds thousands of
// streams would, at 400, have hundreds of megabytes of garbage. So the heap grows by so much
// only as long as it stays within free, in bytes, and by least beyond. Streams have stacks, too,
// of whose size Go lets the heap grow by the same percentage.
const (
	most  = 400
	least = 20
	free  = 200 << 20
)

// percentFor is by how much a heap may grow that has so many bytes in use, beside
// stacks and globals of so many bytes.
func percentFor(live, beside uint64) int {
	if live >= free {
		return least
	}
	return int(min(max((free-live)*100/max(live+beside, 1), least), most))
}

// Tune has the collector tuned from now on, from each collection to the next. GOGC in the
// environment takes precedence.
func Tune() {
	if os.Getenv("GOGC") != "" {
		return // the operator knows better
	}
	debug.SetGCPercent(most)
	var set atomic.Int64
	set.Store(most)
	// What nobody refers to is finalized after each collection.
	var collected func(*[16]byte)
	collected = func(sentinel *[16]byte) {
		of := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"}}
		metrics.Read(of)
		percent := int64(percentFor(of[0].Value.Uint64(), of[1].Value.Uint64()+of[2].Value.Uint64()))
		// It stops the world for an instant, which a small change isn't worth.
		if old := set.Load(); percent*10 < old*9 || percent*9 > old*10 {
			debug.SetGCPercent(int(percent))
			set.Store(percent)
		}
		runtime.SetFinalizer(sentinel, collected)
	}
	runtime.SetFinalizer(new([16]byte), collected)
}
