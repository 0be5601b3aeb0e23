// Command ownllm is the broker, its edge, its worker and the tools to look after
// them, in one binary. See `ownllm --help`.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/ownllm/ownllm/internal/command"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal asks to stop. From then on signals mean what they always do, so
	// that a second one is final.
	context.AfterFunc(ctx, stop)
	os.Exit(command.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv))
}
