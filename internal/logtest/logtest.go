// Package logtest is a log that a test reads while others write it.
package logtest

import (
	"strings"
	"sync"
)

// Book keeps what is logged. The zero Book is empty; it is safe for concurrent use.
type Book struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (b *Book) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

// String is all that was logged.
func (b *Book) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// Count says how often a text is in the log.
func (b *Book) Count(text string) int { return strings.Count(b.String(), text) }
