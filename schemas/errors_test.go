package schemas

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// codeRow is one row of the contract, written down here a second time, by hand: the
// table of the package is what is tested.
type codeRow struct {
	status int
	typ    string
	codes  []string
}

// errorPage is the product's own error page, row by row, in its order.
var errorPage = []codeRow{
	{400, "invalid_request_error", []string{
		"model_required", "messages_required", "model_does_not_support_tools", "model_does_not_support_vision",
		"context_length_exceeded", "invalid_response_format",
	}},
	{401, "authentication_error", []string{"key_invalid", "key_expired", "key_malformed"}},
	{403, "permission_error", []string{"scope_required", "tenant_disabled", "user_deactivated"}},
	{429, "rate_limit_exceeded", []string{"budget_exceeded", "concurrency_limit", "tenant_qps_limit"}},
	{503, "agent_unavailable", []string{"agent_offline", "tunnel_down", "model_loading"}},
	{500, "internal_error", []string{"internal_error"}},
}

// extensions are the codes that we added for failures that the page has no name for.
var extensions = []codeRow{
	{400, "invalid_request_error", []string{"invalid_json", "invalid_value"}},
	{404, "invalid_request_error", []string{"model_not_found", "not_found"}},
	{405, "invalid_request_error", []string{"method_not_allowed"}},
	{413, "invalid_request_error", []string{"request_too_large"}},
	{429, "rate_limit_exceeded", []string{"too_many_failures"}},
	{503, "agent_unavailable", []string{"queue_full"}},
	{504, "agent_unavailable", []string{"agent_timeout"}},
	{502, "internal_error", []string{"backend_error"}},
}

func TestCodesAreTheContract(t *testing.T) {
	type row struct {
		Code      Code
		Status    int
		Type      string
		Extension bool
	}
	var want, got []row
	for i, rows := range [][]codeRow{errorPage, extensions} {
		for _, r := range rows {
			for _, code := range r.codes {
				want = append(want, row{Code(code), r.status, r.typ, i == 1})
			}
		}
	}
	for _, info := range Codes {
		got = append(got, row{info.Code, info.Status, info.Type, info.Extension})
		if !strings.HasSuffix(info.When, ".") {
			t.Errorf("%s: %q isn't a sentence", info.Code, info.When)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the table isn't the contract (-contract +table):\n%s", diff)
	}
}

func TestEveryCodeConstantIsInTheTable(t *testing.T) {
	names := constants(t, "Code", "")
	if len(names) != len(Codes) {
		t.Errorf("%d constants, %d rows", len(names), len(Codes))
	}
	for _, value := range names {
		if !Code(value).Known() {
			t.Errorf("code %q isn't in the table", value)
		}
		if info := Code(value).Info(); info.Code != Code(value) {
			t.Errorf("code %q has the row of %q", value, info.Code)
		}
	}
}

func TestUnknownCode(t *testing.T) {
	for _, c := range []Code{"", "later_code", `x","a":"`} {
		if c.Known() {
			t.Errorf("code %q is known", c)
		}
		if info := c.Info(); info.Code != CodeInternalError || info.Status != 500 || info.Type != "internal_error" {
			t.Errorf("code %q is %+v", c, info)
		}
		// Nothing that isn't in the table reaches a client.
		got := string(Errorf(c, "m").AppendJSON(nil))
		if want := `{"error":{"message":"m","type":"internal_error","param":null,"code":"internal_error"}}`; got != want {
			t.Errorf("code %q: envelope %s, want %s", c, got, want)
		}
	}
}

func TestEnvelopeBytes(t *testing.T) {
	for want, e := range map[string]*Error{
		`{"error":{"message":"No model.","type":"invalid_request_error","param":"model","code":"model_required"}}`:                                 Errorf(CodeModelRequired, "No model.").WithParam("model"),
		`{"error":{"message":"","type":"authentication_error","param":null,"code":"key_malformed"}}`:                                               {Code: CodeKeyMalformed},
		`{"error":{"message":"a \"b\"\n<c> & é \ufffd","type":"rate_limit_exceeded","param":"x[0].\"y\"","code":"budget_exceeded"}}`:               {Code: CodeBudgetExceeded, Message: "a \"b\"\n<c> & é \xff", Param: `x[0]."y"`, RetryAfter: time.Hour},
		`{"error":{"message":"100% of 7","type":"agent_unavailable","param":null,"code":"agent_timeout"}}`:                                         Errorf(CodeAgentTimeout, "100%% of %d", 7),
		`{"error":{"message":"\\u0041\u0000","type":"internal_error","param":null,"code":"backend_error"}}`:                                        {Code: CodeBackendError, Message: "\\u0041\x00"},
		`{"error":{"message":"The key isn't scoped for \"qwen/qwen2.5:32b\".","type":"permission_error","param":"model","code":"scope_required"}}`: Errorf(CodeScopeRequired, "The key isn't scoped for %q.", "qwen/qwen2.5:32b").WithParam("model"),
	} {
		if got := string(e.AppendJSON(nil)); got != want {
			t.Errorf("envelope\n%s\nwant\n%s", got, want)
		}
		if got := string(e.AppendJSON([]byte("data: "))); got != "data: "+want {
			t.Errorf("what was in dst is gone: %s", got)
		}
	}
}

// decodedEnvelope is the envelope as an SDK sees it.
type decodedEnvelope struct {
	Error struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    *string `json:"code"`
	} `json:"error"`
}

func TestEnvelopeOfEveryCode(t *testing.T) {
	for _, info := range Codes {
		e := &Error{Code: info.Code, Message: "m"}
		var got decodedEnvelope
		if err := json.Unmarshal(e.AppendJSON(nil), &got); err != nil {
			t.Fatal(err)
		}
		if got.Error.Type != info.Type || got.Error.Code == nil || *got.Error.Code != string(info.Code) || got.Error.Param != nil {
			t.Errorf("%s: envelope %+v", info.Code, got)
		}
		if e.Status() != info.Status {
			t.Errorf("%s: status %d, want %d", info.Code, e.Status(), info.Status)
		}
		if e.Error() != string(info.Code)+": m" {
			t.Errorf("%s: Error() is %q", info.Code, e.Error())
		}
	}
}

func TestRetryAfterSeconds(t *testing.T) {
	for _, info := range Codes {
		got := (&Error{Code: info.Code}).RetryAfterSeconds()
		if must := info.Status == 429 || info.Status == 503; must != (got > 0) {
			t.Errorf("%s (%d): Retry-After %d", info.Code, info.Status, got)
		}
	}
	for _, c := range []struct {
		code Code
		wait time.Duration
		want int
	}{
		{CodeConcurrencyLimit, 0, 1},
		{CodeAgentOffline, 0, 2},
		{CodeAgentOffline, -time.Hour, 2},
		{CodeInternalError, 0, 0},
		{CodeInternalError, -1, 0},
		{CodeInternalError, 2 * time.Second, 2},
		{CodeTenantQPSLimit, 1, 1},
		{CodeTenantQPSLimit, time.Millisecond, 1},
		{CodeTenantQPSLimit, time.Second, 1},
		{CodeTenantQPSLimit, time.Second + 1, 2},
		{CodeModelLoading, 2500 * time.Millisecond, 3},
		{CodeBudgetExceeded, 30 * 24 * time.Hour, 2592000},
		{CodeBudgetExceeded, math.MaxInt64, 9223372037},
	} {
		e := Errorf(c.code, "m").WithRetryAfter(c.wait)
		if got := e.RetryAfterSeconds(); got != c.want {
			t.Errorf("%s after %v: Retry-After %d, want %d", c.code, c.wait, got, c.want)
		}
	}
}

func TestRetryable(t *testing.T) {
	for _, info := range Codes {
		if got, want := (&Error{Code: info.Code}).Retryable(), info.Code != "budget_exceeded"; got != want {
			t.Errorf("%s: Retryable() is %v", info.Code, got)
		}
	}
}

func TestErrorCopies(t *testing.T) {
	e := Errorf(CodeModelLoading, "%s is loading", "m")
	if e.Message != "m is loading" {
		t.Errorf("message %q", e.Message)
	}
	named, later := e.WithParam("model"), e.WithRetryAfter(time.Minute)
	if e.Param != "" || e.RetryAfter != 0 {
		t.Errorf("the original has changed: %+v", e)
	}
	if named.Param != "model" || named.Message != e.Message || later.RetryAfter != time.Minute || later.Code != e.Code {
		t.Errorf("copies %+v, %+v", named, later)
	}
}

func TestErrorIs(t *testing.T) {
	e := Errorf(CodeModelLoading, "a")
	wrapped := fmt.Errorf("route: %w", e)
	if !errors.Is(wrapped, Errorf(CodeModelLoading, "b")) {
		t.Error("an error isn't one of the same code")
	}
	if errors.Is(wrapped, Errorf(CodeAgentOffline, "a")) || errors.Is(e, io.EOF) || errors.Is(io.EOF, e) {
		t.Error("an error is one of another code")
	}
}

func TestAsError(t *testing.T) {
	e := Errorf(CodeModelLoading, "a")
	if got := AsError(fmt.Errorf("route: %w", e)); got != e {
		t.Errorf("AsError returns %+v", got)
	}
	got := AsError(errors.New("dial postgres://user:secret@db"))
	if got.Code != CodeInternalError || strings.Contains(got.Message, "secret") || got.RetryAfterSeconds() <= 0 {
		t.Errorf("AsError of a foreign error is %+v", got)
	}
}

func TestErrorOverTheWire(t *testing.T) {
	for _, info := range Codes {
		sent := &Error{Code: info.Code, Message: "m\n\"é\"", Param: "p", RetryAfter: 1500 * time.Millisecond}
		b, err := json.Marshal(sent)
		if err != nil {
			t.Fatal(err)
		}
		var got Error
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(sent, &got); diff != "" {
			t.Errorf("error came back changed (-sent +got):\n%s", diff)
		}
	}
	b, err := json.Marshal(Errorf(CodeInternalError, "m"))
	if want := `{"code":"internal_error","message":"m"}`; err != nil || string(b) != want {
		t.Errorf("error is %s, %v, want %s", b, err, want)
	}
}

func TestErrorOfAnotherVersion(t *testing.T) {
	for b, want := range map[string]Error{
		`{"code":"later_code","message":"m","param":"p"}`: {CodeInternalError, `unknown code "later_code": m`, "p", 0},
		`{"message":"m"}`: {CodeInternalError, `unknown code "": m`, "", 0},
		`{"code":"model_loading","message":"m","later":[1]}`:                          {CodeModelLoading, "m", "", 0},
		`{"code":"model_loading","message":"m","retry_after_ms":-5}`:                  {CodeModelLoading, "m", "", 0},
		`{"code":"model_loading","message":"m","retry_after_ms":9223372036854}`:       {CodeModelLoading, "m", "", maxRetryAfter},
		`{"code":"model_loading","message":"m","retry_after_ms":9223372036854775807}`: {CodeModelLoading, "m", "", maxRetryAfter},
		`{"code":"budget_exceeded","message":"m","retry_after_ms":2678400000}`:        {CodeBudgetExceeded, "m", "", 31 * 24 * time.Hour},
	} {
		var got Error
		if err := json.Unmarshal([]byte(b), &got); err != nil {
			t.Errorf("%s: %v", b, err)
		} else if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", b, diff)
		}
	}
	for _, b := range []string{`"text"`, `7`, `[]`, `{"code":7}`, `{"code":"model_loading","retry_after_ms":1e99}`} {
		var got Error
		if err := json.Unmarshal([]byte(b), &got); err == nil {
			t.Errorf("%s is taken for %+v", b, got)
		}
	}
}

func FuzzErrorOverTheWire(f *testing.F) {
	f.Add([]byte(`{"code":"model_loading","message":"m","param":"p","retry_after_ms":1500}`))
	f.Add([]byte(`{"code":"later","retry_after_ms":9223372036854775807}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var e Error
		if err := json.Unmarshal(b, &e); err != nil || e == (Error{}) {
			return // "null" leaves an Error as it was
		}
		if !e.Code.Known() {
			t.Fatalf("%q became code %q", b, e.Code)
		}
		wait := e.RetryAfterSeconds()
		if wait < 0 || wait == 0 && (e.Status() == 429 || e.Status() == 503) {
			t.Fatalf("%q has Retry-After %d", b, wait)
		}
		var got decodedEnvelope
		if err := json.Unmarshal(e.AppendJSON(nil), &got); err != nil {
			t.Fatalf("%q: %v", e.AppendJSON(nil), err)
		}
		if got.Error.Message != e.Message || *got.Error.Code != string(e.Code) || (got.Error.Param == nil) != (e.Param == "") {
			t.Fatalf("%+v became %+v", e, got)
		}
	})
}
