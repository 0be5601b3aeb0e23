package schemas

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func sampleJob() Job {
	return Job{
		Version: ProtocolVersion, Request: "req_1", Attempt: 2, Nonce: "n", Owner: "own_1", Tenant: "ten_1", Key: "key_1",
		Operation: "chat", Model: "qwen/qwen2.5:32b", Deadline: 1_800_000_000_123, ColdWait: 5000, Stream: true, IncludeUsage: true,
		Completion: "chatcmpl-1", Created: 1_800_000_000, ReplyModel: "fast", Limit: 400, More: true, Count: true,
	}
}

func TestJobRoundTrip(t *testing.T) {
	for about, body := range map[string]string{
		"a body":         `{"model":"m","messages":[]}`,
		"no body":        "",
		"newlines":       "\n{\n}\n",
		"not UTF-8":      "\xff\x00\xfe",
		"looks like one": `{"v":1,"body_size":7}` + "\n",
		"the largest":    strings.Repeat("x", MaxInlineBody),
	} {
		t.Run(about, func(t *testing.T) {
			job := sampleJob()
			payload, err := job.Encode(body)
			if err != nil {
				t.Fatal(err)
			}
			got, gotBody, err := DecodeJob(payload)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&job, got); diff != "" {
				t.Errorf("job came back changed (-sent +got):\n%s", diff)
			}
			if gotBody == nil || string(gotBody) != body {
				t.Errorf("body %q came back as %q", body, gotBody)
			}
		})
	}
}

func TestJobWithBodyElsewhere(t *testing.T) {
	job := sampleJob()
	job.BodySize = MaxInlineBody + 1
	payload, err := job.Encode(strings.Repeat("secret", 100_000))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(payload, []byte("secret")) {
		t.Error("a body that is fetched travels with the job too")
	}
	got, body, err := DecodeJob(payload)
	if err != nil || body != nil {
		t.Fatalf("body %q, %v; want none", body, err)
	}
	if diff := cmp.Diff(&job, got); diff != "" {
		t.Errorf("job came back changed (-sent +got):\n%s", diff)
	}
}

func TestDecodeJobRefuses(t *testing.T) {
	payload := func(change func(*Job)) string {
		job := sampleJob()
		change(&job)
		b, err := job.Encode("{}")
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for about, p := range map[string]string{
		"nothing":             "",
		"no newline":          strings.TrimSuffix(payload(func(*Job) {}), "\n{}"),
		"an empty head":       "\n{}",
		"null":                "null\n",
		"not JSON":            "{\n{}",
		"an older version":    payload(func(j *Job) { j.Version = 0 }),
		"a newer version":     payload(func(j *Job) { j.Version = ProtocolVersion + 1 }),
		"no request":          payload(func(j *Job) { j.Request = "" }),
		"no nonce":            payload(func(j *Job) { j.Nonce = "" }),
		"no owner":            payload(func(j *Job) { j.Owner = "" }),
		"no tenant":           payload(func(j *Job) { j.Tenant = "" }),
		"no model":            payload(func(j *Job) { j.Model = "" }),
		"no operation":        payload(func(j *Job) { j.Operation = "" }),
		"a negative limit":    payload(func(j *Job) { j.Limit = -1 }),
		"a negative size":     payload(func(j *Job) { j.BodySize = -1 }),
		"a body here as well": payload(func(j *Job) { j.BodySize = 2 }) + "{}",
		"a string for number": strings.Replace(payload(func(*Job) {}), `"attempt":2`, `"attempt":"2"`, 1),
	} {
		if job, body, err := DecodeJob([]byte(p)); err == nil || job != nil || body != nil {
			t.Errorf("%s: %q is taken for %+v, %q, %v", about, p, job, body, err)
		}
	}
}

// The deduplication id has to differ wherever two jobs differ, since JetStream drops
// the second of two in silence.
func TestJobMsgID(t *testing.T) {
	job := sampleJob()
	if got, want := job.MsgID(), "ten_1:req_1:2"; got != want {
		t.Errorf("MsgID %q, want %q", got, want)
	}
	seen := map[string]bool{job.MsgID(): true}
	for _, change := range []func(*Job){
		func(j *Job) { j.Tenant = "ten_2" }, func(j *Job) { j.Request = "req_2" }, func(j *Job) { j.Attempt = 3 },
	} {
		other := job
		change(&other)
		if seen[other.MsgID()] {
			t.Errorf("MsgID %q is taken", other.MsgID())
		}
		seen[other.MsgID()] = true
	}
}

func TestBodyRequest(t *testing.T) {
	for _, offset := range []int{0, 1, BodyPiece, 1 << 40} {
		if got, err := DecodeBodyRequest(BodyRequest{offset}.Encode()); err != nil || got != offset {
			t.Errorf("offset %d came back as %d, %v", offset, got, err)
		}
	}
	for _, b := range []string{"", "null{}", `{"offset":-1}`, `{"offset":"1"}`, `{"offset":1.5}`, `{"offset":1e30}`, "[]"} {
		if got, err := DecodeBodyRequest([]byte(b)); err == nil {
			t.Errorf("body request %q is taken for %d", b, got)
		}
	}
}

func TestUsageReport(t *testing.T) {
	report := UsageReport{Version: ProtocolVersion, Request: "req_1", Attempt: 2, Usage: Usage{PromptTokens: 17, CompletionTokens: 40}}
	got, err := DecodeUsageReport(report.Encode())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&report, got); diff != "" {
		t.Errorf("report came back changed (-sent +got):\n%s", diff)
	}
	other := report
	other.Attempt = 1
	seen := map[string]bool{}
	for _, id := range []string{
		report.MsgID("ten_1", "agt_1"), other.MsgID("ten_1", "agt_1"), report.MsgID("ten_2", "agt_1"), report.MsgID("ten_1", "agt_2"),
	} {
		if seen[id] {
			t.Errorf("JetStream would take two reports for one: %q", id)
		}
		seen[id] = true
	}
	for _, b := range []string{
		"", "null", "[]", "{}", `{"v":2,"request":"req_1"}`, `{"v":1}`, `{"v":1,"request":"req_1","prompt_tokens":-1}`,
		`{"v":1,"request":"req_1","completion_tokens":-1}`, `{"v":1,"request":"req_1","completion_tokens":1e30}`, `{"v":1,"request":"req_1"}x`,
	} {
		if got, err := DecodeUsageReport([]byte(b)); err == nil {
			t.Errorf("report %q is taken for %+v", b, got)
		}
	}
}

func FuzzDecodeUsageReport(f *testing.F) {
	report := UsageReport{Version: ProtocolVersion, Request: "req_1", Attempt: 2, Usage: Usage{PromptTokens: 17, CompletionTokens: 40}}
	f.Add(report.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := DecodeUsageReport(b)
		if err != nil {
			return
		}
		if got.Request == "" || got.PromptTokens < 0 || got.CompletionTokens < 0 {
			t.Fatalf("%q is taken for %+v", b, got)
		}
		again, err := DecodeUsageReport(got.Encode())
		if err != nil || *again != *got {
			t.Fatalf("%q came back as %+v, %v", b, again, err)
		}
	})
}

func FuzzDecodeJob(f *testing.F) {
	job := sampleJob()
	b, err := job.Encode("{}\n")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"v":1,"body_size":-1}` + "\n"))
	f.Fuzz(func(t *testing.T, payload []byte) {
		job, body, err := DecodeJob(payload)
		if err != nil {
			return
		}
		if job.BodySize > 0 && body != nil || job.BodySize < 0 || job.Version != ProtocolVersion {
			t.Fatalf("%q was taken for %+v with body %q", payload, job, body)
		}
		again, err := job.Encode(string(body))
		if err != nil {
			t.Fatal(err)
		}
		got, gotBody, err := DecodeJob(again)
		if err != nil || !bytes.Equal(body, gotBody) {
			t.Fatalf("%q became %q: body %q, %v", payload, again, gotBody, err)
		}
		if diff := cmp.Diff(job, got); diff != "" {
			t.Fatalf("%q came back changed:\n%s", payload, diff)
		}
	})
}

func FuzzDecodeBodyRequest(f *testing.F) {
	f.Add([]byte(`{"offset":131072}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if offset, err := DecodeBodyRequest(b); err == nil && offset < 0 {
			t.Errorf("%q asks for offset %d", b, offset)
		}
	})
}
