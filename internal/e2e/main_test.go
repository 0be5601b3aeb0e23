// Package e2e tests OwnLLM from outside: the built binary, real processes, a real
// nats-server, a real PostgreSQL, the official SDKs.
package e2e

import (
	"testing"

	"github.com/ownllm/ownllm/internal/pgtest"
	"github.com/ownllm/ownllm/internal/stack"
)

func TestMain(m *testing.M) { pgtest.Main(stack.Tests{M: m}) }
