// Package sdk runs the official OpenAI SDKs for Python, Node and Go, unmodified,
// against OwnLLM as its users run it. scripts/README.md describes the checks of the
// first two; those of the third are here.
//
// With OWNLLM_BASE_URL and its kin in the environment they check the stack that runs
// there, and else one that they start.
package sdk

import (
	"net/http"
	"testing"

	"github.com/ownllm/ownllm/internal/stack"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(tests{m}) }

// tests are the tests of the package, and what they leave to be cleared away.
type tests struct{ *testing.M }

func (t tests) Run() int {
	code := t.M.Run()
	stack.Cleanup()
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	return code
}
