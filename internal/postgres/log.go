package postgres

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
)

// serverLog passes on what a server prints, line by line, and keeps the last lines
// for the error of a server that doesn't start.
type serverLog struct {
	log *slog.Logger

	mu   sync.Mutex
	rest []byte // a line that isn't complete yet
	last []string
}

const (
	keptLines = 8
	maxLine   = 8 << 10
)

// Write implements io.Writer.
func (l *serverLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, p...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte{'\n'})
		if !ok && len(l.rest) < maxLine {
			return len(p), nil
		}
		l.line(string(bytes.TrimSpace(line)))
		l.rest = append(l.rest[:0], rest...)
	}
}

// line passes one line on. What fails a statement is its sender's business, who gets
// the same error; what ends a session or the server is ours.
func (l *serverLog) line(line string) {
	if line == "" {
		return
	}
	if len(l.last) == keptLines {
		l.last = l.last[1:]
	}
	l.last = append(l.last, line)
	severity, text, ok := strings.Cut(line, ":")
	if !ok {
		text = line
	}
	level := slog.LevelDebug
	switch severity {
	case "WARNING":
		level = slog.LevelWarn
	case "FATAL", "PANIC":
		level = slog.LevelError
	}
	l.log.Log(context.Background(), level, "postgres", "severity", severity, "text", strings.TrimSpace(text))
}

// tail returns the last lines, as one.
func (l *serverLog) tail() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.last, "; ")
}
