package quota

import (
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// Outlook is what a gate expects of the next admission of a key. Nothing depends on its
// coming true: it says whether it pays to prepare a request while the books are still being
// asked. Over has to be called once they have answered.
type Outlook struct {
	// Budget says that the key has one that the model draws on.
	Budget bool

	of    *prospect
	under *prospects
}

// maxOutlooks bounds how many requests have an outlook at the same time. One that is refused
// in the end takes room from others meanwhile; and when many wait, CPU time counts, of which it
// takes some to hold a job, rather than one wait more or less.
const maxOutlooks = 2

// refusedFor is how long a key that was refused is taken for one that may be again.
const refusedFor = 10 * time.Second

// prospects remember of each key and model what became of the last admission.
type prospects struct {
	mu    sync.Mutex
	all   map[rateKey]*prospect
	given int // how many have an outlook
}

type prospect struct {
	budget  bool
	price   int64
	room    int       // how many requests may have an outlook at the same time
	given   int       // how many have one
	refused time.Time // when the key last was
}

// Outlook returns what to expect, and false if the next request may well be refused: because
// the key is unknown, has little left, was refused a short time ago, or so many of its requests
// wait for admission that there may not be enough for all of them.
func (g *Gate) Outlook(key schemas.KeyID, model string) (Outlook, bool) {
	if !g.Ready() {
		return Outlook{}, false
	}
	p := &g.prospects
	p.mu.Lock()
	defer p.mu.Unlock()
	of := p.all[rateKey{key, model}]
	if of == nil || p.given >= maxOutlooks || of.given >= of.room || time.Since(of.refused) < refusedFor {
		return Outlook{}, false
	}
	of.given++
	p.given++
	return Outlook{Budget: of.budget, of: of, under: p}, true
}

// Over says that the books have answered.
func (o Outlook) Over() {
	o.under.mu.Lock()
	defer o.under.mu.Unlock()
	o.of.given--
	o.under.given--
}

// room is for how many more requests like the one that was just admitted a key may have an
// outlook: a quarter of those that it has enough for, since other processes admit some, too.
func room(d *books.Decision) int {
	if scarce(d) {
		return 0
	}
	n := d.SlotsFree
	if d.Budget != nil && d.Amount > 0 {
		n = int(min(int64(n), d.BudgetFree/d.Amount))
	}
	return n / 4
}

// admitted takes in that a request was let in.
func (p *prospects) admitted(key schemas.KeyID, model string, d *books.Decision) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := rateKey{key, model}
	of := p.all[k]
	if of == nil {
		if len(p.all) >= maxRates {
			clear(p.all)
		}
		of = &prospect{}
		p.all[k] = of
	}
	of.room, of.budget, of.price = room(d), d.Budget != nil && d.Price > 0, d.Price
}

// refused takes in that a request wasn't let in.
func (p *prospects) refused(key schemas.KeyID, model string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if of := p.all[rateKey{key, model}]; of != nil {
		of.room, of.refused = 0, time.Now()
	}
}

// priced reports whether the model had a price for the key's last request.
func (p *prospects) priced(key schemas.KeyID, model string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	of := p.all[rateKey{key, model}]
	return of != nil && of.price > 0
}
