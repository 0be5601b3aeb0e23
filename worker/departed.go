package worker

import (
	"sync"

	"github.com/ownllm/ownllm/schemas"
)

// departed are owners that were found to be gone. What they have left in the queue ends as
// soon as the bus says once more that nobody is there, instead of after ownerWait each.
type departed struct {
	mu  sync.RWMutex
	set map[schemas.OwnerID]struct{}
}

// maxDeparted bounds the set. Owners don't come back under their names, so that nothing is
// lost but time if all are forgotten.
const maxDeparted = 1024

func (d *departed) has(o schemas.OwnerID) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	_, ok := d.set[o]
	return ok
}

func (d *departed) add(o schemas.OwnerID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.set == nil || len(d.set) >= maxDeparted {
		d.set = make(map[schemas.OwnerID]struct{})
	}
	d.set[o] = struct{}{}
}

// remove notes that an owner was heard of.
func (d *departed) remove(o schemas.OwnerID) {
	if !d.has(o) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.set, o)
}
