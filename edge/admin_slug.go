package edge

import (
	"context"
	"sync"
	"time"

	"github.com/ownllm/ownllm/broker/books"
	"github.com/ownllm/ownllm/schemas"
)

// slugs remembers the slugs of tenants, which never change.
type slugs struct {
	mu    sync.Mutex
	known map[schemas.TenantID]string
}

// slugWait bounds the question for slugs: an answer without them is better than none.
const slugWait = time.Second

// tenantLister is the part of the books that has the slugs.
type tenantLister interface {
	ListTenants(ctx context.Context, page books.Page) ([]books.Tenant, string, error)
}

// slugsOf returns the slugs of the tenants of some things, as far as they can be found
// out now.
func slugsOf[T any](ctx context.Context, e *Edge, things []T, tenant func(T) schemas.TenantID) map[schemas.TenantID]string {
	tenants := make([]schemas.TenantID, len(things))
	for i, thing := range things {
		tenants[i] = tenant(thing)
	}
	return e.slugs.of(ctx, e.Books, tenants)
}

func (s *slugs) of(ctx context.Context, store tenantLister, tenants []schemas.TenantID) map[schemas.TenantID]string {
	found, missing := s.look(tenants)
	if !missing {
		return found
	}
	ctx, cancel := context.WithTimeout(ctx, slugWait)
	defer cancel()
	for p := (books.Page{Limit: 1000}); ; {
		list, next, err := store.ListTenants(ctx, p)
		s.learn(list)
		if p.After = next; err != nil || next == "" {
			found, _ = s.look(tenants)
			return found
		}
	}
}

func (s *slugs) look(tenants []schemas.TenantID) (found map[schemas.TenantID]string, missing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found = make(map[schemas.TenantID]string)
	for _, id := range tenants {
		if slug, ok := s.known[id]; ok {
			found[id] = slug
		} else if id != "" {
			missing = true
		}
	}
	return found, missing
}

func (s *slugs) learn(list []books.Tenant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = make(map[schemas.TenantID]string)
	}
	for _, t := range list {
		s.known[t.ID] = t.Slug
	}
}
