//go:build !linux

package postgres

import (
	"context"
	"log/slog"
)

// install leaves it to the user: there is no one way here.
func install(context.Context, *slog.Logger) error { return ErrNotFound }
