package schemas

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what is generated instead of comparing it")

// classes are what the SDKs for Python and Node throw, by status.
func class(status int) string {
	switch {
	case status == 400:
		return "BadRequestError"
	case status == 401:
		return "AuthenticationError"
	case status == 403:
		return "PermissionDeniedError"
	case status == 404:
		return "NotFoundError"
	case status == 429:
		return "RateLimitError"
	case status >= 500:
		return "InternalServerError"
	}
	return "" // the base class of each
}

// reference renders the error reference.
func reference() string {
	var b strings.Builder
	b.WriteString(`# Errors

<!-- Made from the table in schemas by: go test ./schemas -run TestErrorReference -update -->

Every failure has OpenAI's envelope, over HTTP and over NATS, as a status or as the last event
of a stream: ` + "`{\"error\":{\"message\":…,\"type\":…,\"param\":…,\"code\":…}}`" + `. Decide by ` + "`code`" + `; the message is
for people. Every answer has an ` + "`x-request-id`" + `, under which the operator finds the details.

| SDK | what is thrown | code | in a stream that has begun |
|---|---|---|---|
| Python | the class below, ` + "`openai.APIStatusError`" + ` for the others | ` + "`e.code`" + `, ` + "`e.status_code`" + ` | ` + "`openai.APIError`" + ` while you iterate |
| Node | the class below, ` + "`OpenAI.APIError`" + ` for the others | ` + "`e.code`" + `, ` + "`e.status`" + ` | ` + "`OpenAI.APIError`" + ` while you iterate |
| Go | ` + "`*openai.Error`" + `, by ` + "`errors.As`" + ` | ` + "`e.Code`" + `, ` + "`e.StatusCode`" + ` | ` + "`stream.Err()`" + ` |
| NATS | a message of the kind ` + "`error`" + ` | ` + "`error.code`" + `, ` + "`retry_after`" + ` | the same |

The SDKs try 429 and 5xx again, twice, and wait for ` + "`Retry-After`" + `. They don't after a stream has
begun, nor where ` + "`x-should-retry`" + ` is false. A stream without ` + "`[DONE]`" + ` and without an error has lost
its connection: it isn't complete.

`)
	for _, info := range Codes {
		fmt.Fprintf(&b, "## %s\n\n%s %s\n\n", info.Code, info.When, info.Advice())
		name := class(info.Status)
		if name == "" {
			name = "the base class"
		} else {
			name = "`" + name + "`"
		}
		retry := "no"
		if info.Status == 429 || info.Status >= 500 {
			retry = "yes"
		}
		if e := (&Error{Code: info.Code}); !e.Retryable() {
			retry = "no: `x-should-retry: false`"
		}
		after := "no"
		if (&Error{Code: info.Code}).RetryAfterSeconds() > 0 {
			after = "always"
		} else if info.Code == CodeInternalError {
			after = "where a time is known"
		}
		fmt.Fprintf(&b, "| status | type | Python, Node | SDKs try again | Retry-After |\n|---|---|---|---|---|\n| %d | `%s` | %s | %s | %s |\n\n",
			info.Status, info.Type, name, retry, after)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// TestErrorReference holds ERRORS.md to the table.
func TestErrorReference(t *testing.T) {
	for _, info := range Codes {
		if info.Advice() == "" {
			t.Errorf("advice has nothing for %s", info.Code)
		}
	}
	if len(advice) != len(Codes) {
		t.Errorf("there is advice for %d codes, and there are %d", len(advice), len(Codes))
	}
	file := filepath.Join("..", "ERRORS.md")
	want := reference()
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Error("ERRORS.md isn't what the table says: run go test ./schemas -run TestErrorReference -update")
	}
}
