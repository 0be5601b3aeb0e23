package adminapi_test

import (
	"encoding/csv"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ownllm/ownllm/internal/adminapi"
)

var someUsage = []adminapi.Usage{
	{
		Tenant: "ten_1", TenantSlug: "acme", User: "usr_1", Email: "ada@example.com", Key: "key_1", KeyName: `Ada's, "best" laptop`,
		KeyPrefix: "sk-ownllm-ab12", Model: "qwen/qwen2.5:32b", Day: "2026-11-30",
		Requests: 3, PromptTokens: 1 << 40, CompletionTokens: 0, CostCents: 1_500_000,
	},
	{Tenant: "ten_1", KeyName: "=1+1", Model: "m", Requests: 1},
}

func TestUsageCSV(t *testing.T) {
	for by, want := range map[string]string{
		"": "requests,prompt_tokens,completion_tokens,cost_cents\n" +
			"3,1099511627776,0,1.5\n1,0,0,0\n",
		"day,key": "day,key,key_name,key_prefix,requests,prompt_tokens,completion_tokens,cost_cents\n" +
			"2026-11-30,key_1,\"Ada's, \"\"best\"\" laptop\",sk-ownllm-ab12,3,1099511627776,0,1.5\n,,'=1+1,,1,0,0,0\n",
	} {
		var out strings.Builder
		if err := adminapi.WriteUsageCSV(&out, strings.FieldsFunc(by, func(r rune) bool { return r == ',' }), someUsage); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("by %s, -want +got:\n%s", by, diff)
		}
	}

	// Every field of the JSON has its column.
	var out strings.Builder
	if err := adminapi.WriteUsageCSV(&out, []string{"tenant", "user", "key", "model", "day"}, someUsage); err != nil {
		t.Fatal(err)
	}
	lines, err := csv.NewReader(strings.NewReader(out.String())).ReadAll()
	if err != nil || len(lines) != 3 {
		t.Fatalf("%v, %v", lines, err)
	}
	var fields []string
	for i := range reflect.TypeFor[adminapi.Usage]().NumField() {
		name, _, _ := strings.Cut(reflect.TypeFor[adminapi.Usage]().Field(i).Tag.Get("json"), ",")
		fields = append(fields, name)
	}
	if diff := cmp.Diff(fields, lines[0]); diff != "" {
		t.Errorf("columns, -want +got:\n%s", diff)
	}
	for i, value := range lines[1] {
		if value == "" {
			t.Errorf("%s is empty", fields[i])
		}
	}
}

func TestNoCellIsAFormula(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "laptop": "laptop", "a-b=c+d@e": "a-b=c+d@e", "ada+ci@example.com": "ada+ci@example.com",
		"=1+1": "'=1+1", "+1": "'+1", "-1": "'-1", "@SUM(A1)": "'@SUM(A1)", `=HYPERLINK("http://x","y")`: `'=HYPERLINK("http://x","y")`,
		" =1": " '=1", "\u00a0=1": "\u00a0'=1", `"=1`: `"'=1`, "\t=1": "\t'=1", "＝1+1": "'＝1+1", "a;=1": "a;'=1", "a; -1": "a; '-1", "'=1": "'=1", "==": "'==",
	} {
		var out strings.Builder
		if err := adminapi.WriteUsageCSV(&out, []string{"model"}, []adminapi.Usage{{Model: text}}); err != nil {
			t.Fatal(err)
		}
		lines, err := csv.NewReader(strings.NewReader(out.String())).ReadAll()
		if err != nil || len(lines) != 2 || lines[1][0] != want {
			t.Errorf("%q becomes %q (%v), want %q", text, lines, err, want)
		}
	}
}

func TestCSVThatCantBeWritten(t *testing.T) {
	if err := adminapi.WriteUsageCSV(full{}, []string{"model"}, someUsage); !errors.Is(err, errFull) {
		t.Errorf("%v", err)
	}
}

var errFull = errors.New("no space left")

// full takes nothing.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, errFull }
