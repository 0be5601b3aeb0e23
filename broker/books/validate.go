package books

import (
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of what may be stored.
const (
	maxName      = 200
	maxEmail     = 254
	maxLocal     = 64
	maxModel     = 256
	maxScopes    = 100
	maxRate      = 1_000_000
	maxBudget    = 1_000_000_000_000 // cents
	maxTTL       = 100 * 365 * 24 * time.Hour
	maxOverlap   = 365 * 24 * time.Hour
	maxInventory = 1 << 20 // bytes of JSON

	// ScopeAll is the scope of every model.
	ScopeAll = scopeModel + "*"

	scopeModel = "model:"
)

// slugForm is a label of a host name, because a tenant's address has it as one.
var slugForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func checkSlug(slug string) error {
	if !slugForm.MatchString(slug) {
		return invalid("slug", "slug must have 1 to 63 lower-case letters, digits and hyphens, and no hyphen at either end.")
	}
	return nil
}

// printable reports whether the text is UTF-8 with nothing in it that a terminal would
// act on: control characters, line separators, and format characters, but for the two
// joiners that some scripts and emoji are written with.
func printable(text string) bool {
	const nonJoiner, joiner = '\u200c', '\u200d'
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool {
		return r != nonJoiner && r != joiner && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp)
	})
}

func checkName(name string) error {
	switch {
	case !printable(name):
		return invalid("name", "name must not hold control characters.")
	case utf8.RuneCountInString(name) > maxName:
		return invalid("name", "name must have at most %d characters.", maxName)
	}
	return nil
}

// emailForm is the usual shape, not the whole grammar: one @, no spaces, quotes or
// brackets. A lone host is allowed ("root@localhost").
var emailForm = regexp.MustCompile(`^[^\s@"(),:;<>\[\]\\]+@[^\s@"(),:;<>\[\]\\.]+(\.[^\s@"(),:;<>\[\]\\.]+)*$`)

func checkEmail(email string) error {
	if len(email) > maxEmail || !printable(email) || !emailForm.MatchString(email) || strings.IndexByte(email, '@') > maxLocal {
		return invalid("email", "email must be an e-mail address, like ada@example.com.")
	}
	return nil
}

// checkScopes returns the scopes to store: without repetition, and all models if none
// was given.
func checkScopes(scopes []string) ([]string, error) {
	if len(scopes) == 0 {
		return []string{ScopeAll}, nil
	}
	if len(scopes) > maxScopes {
		return nil, invalid("scopes", "scopes must be at most %d.", maxScopes)
	}
	out := make([]string, 0, len(scopes))
	seen := make(map[string]bool, len(scopes))
	for _, s := range scopes {
		model, ok := strings.CutPrefix(s, scopeModel)
		// A pattern isn't known: it would be taken for an id, and match nothing.
		if !ok || !validModel(model) || s != ScopeAll && strings.Contains(model, "*") {
			return nil, invalid("scopes", "Each scope must be %s or %s<id>, the id being at most %d bytes, without *, control characters, or spaces at its ends.",
				ScopeAll, scopeModel, maxModel)
		}
		if !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	return out, nil
}

func validModel(id string) bool {
	return id != "" && len(id) <= maxModel && printable(id) && strings.TrimSpace(id) == id
}

func checkBudget(cents *int64) error {
	if cents != nil && (*cents < 0 || *cents > maxBudget) {
		return invalid("budget_cents", "budget_cents must be from 0 to %d.", int64(maxBudget))
	}
	return nil
}

// checkRate returns a limit of requests: the default if none was given.
func checkRate(param string, given *int, standard int) (int, error) {
	if given == nil {
		return standard, nil
	}
	if *given < 1 || *given > maxRate {
		return 0, invalid(param, "%s must be from 1 to %d.", param, maxRate)
	}
	return *given, nil
}
