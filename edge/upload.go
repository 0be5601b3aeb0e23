package edge

import (
	"sync"

	"github.com/ownllm/ownllm/schemas"
)

// uploads bounds how many bodies of one key are read at once. What a key may have in flight
// is decided later, when the request is known; until then a body takes memory, for as long as
// its client likes to take. The zero value is empty.
type uploads struct {
	mu    sync.Mutex
	count map[schemas.KeyID]int
}

// uploadSlack is how many more bodies may be on their way than requests may be in flight, so
// that ordinary clients that all come at once meet the limit where it is decided.
const uploadSlack = 32

// begin counts a body in, or refuses it. Each that is counted in is followed by one end.
func (u *uploads) begin(key schemas.KeyID, concurrency int) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.count[key] >= concurrency+uploadSlack {
		return schemas.Errorf(schemas.CodeConcurrencyLimit,
			"%d requests of this key are being sent, and %d may be in flight. Send fewer at once.", u.count[key], concurrency)
	}
	if u.count == nil {
		u.count = make(map[schemas.KeyID]int)
	}
	u.count[key]++
	return nil
}

// end counts a body out.
func (u *uploads) end(key schemas.KeyID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.count[key]--; u.count[key] == 0 {
		delete(u.count, key)
	}
}
