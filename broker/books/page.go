package books

import (
	"encoding/base64"
	"encoding/json"
	"slices"

	"github.com/ownllm/ownllm/schemas"
)

const (
	defaultPage = 100
	maxPage     = 1000
)

// Page asks for a part of a list. Lists are in the order in which things were made.
type Page struct {
	// Limit is how many are wanted, 1 to 1000; 0 stands for 100.
	Limit int
	// After is the cursor that came with the page before; empty: from the start. That of
	// a list of things with ids is the last one's id.
	After string
}

// check returns the limit to use, one more than is wanted, so that it shows whether
// there is a next page. prefix is that of the list's ids.
func (p Page) check(prefix string) (int, error) {
	if p.After != "" {
		if err := schemas.ValidateID(p.After, prefix); err != nil {
			return 0, invalid("after", "after must be the id of the last entry of the page before (%s…).", prefix)
		}
	}
	return p.limit()
}

// limit is check for a list whose cursor isn't a prefixed id.
func (p Page) limit() (int, error) {
	switch {
	case p.Limit == 0:
		return defaultPage + 1, nil
	case p.Limit < 0 || p.Limit > maxPage:
		return 0, invalid("limit", "limit must be from 1 to %d.", maxPage)
	}
	return p.Limit + 1, nil
}

// cut takes the surplus entry off a list that was asked for with check's limit, and
// returns the cursor of the next page, empty if this is the last.
func cut[T any](list []T, limit int, id func(T) string) ([]T, string) {
	if len(list) < limit {
		return list, ""
	}
	list = list[:limit-1]
	return list, id(list[len(list)-1])
}

// cursor packs the values that a list is sorted by. They are UTF-8.
func cursor(values ...string) string {
	if len(values) == 0 {
		return ""
	}
	text, _ := json.Marshal(values) // strings always can be
	return base64.RawURLEncoding.EncodeToString(text)
}

// openCursor unpacks what cursor has packed: n values that can be stored, or none if it
// is empty.
func openCursor(after string, n int) (values []string, err error) {
	if after == "" {
		return nil, nil
	}
	text, err := base64.RawURLEncoding.DecodeString(after)
	if err == nil {
		err = json.Unmarshal(text, &values)
	}
	bad := func(v string) bool { return !printable(v) }
	if err != nil || n == 0 || len(values) != n || slices.ContainsFunc(values, bad) {
		return nil, invalid("after", "after must be the cursor that came with the page before of the same list.")
	}
	return values, nil
}
