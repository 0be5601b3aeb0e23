package command

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ownllm/ownllm/internal/adminapi"
)

func TestUsage(t *testing.T) {
	for name, tc := range map[string]struct {
		args  []string
		asked string
		want  string
	}{
		"by default": {
			nil, "GET /api/v1/usage?by=tenant%2Ckey%2Cmodel&limit=500",
			"TENANT  KEY              NAME    MODEL          REQUESTS  PROMPT TOKENS  COMPLETION TOKENS  COST IN CENTS\n" +
				"acme    sk-ownllm-ab12…  laptop  llama-3.3-70b      1200          50000                  7       12.50175\n" +
				"acme    key_2            =1+1    demo                  1              0                  0        0.00000\n" +
				"TOTAL                                               1201          50000                  7       12.50175\n",
		},
		"cut down": {
			[]string{"--tenant", "acme", "--user", "ada@example.com", "--key", keyID, "--model", "a/b", "--since", "2026-11-01", "--until", "2026-11-30T10:00:00+02:00", "--by", "day"},
			"GET /api/v1/usage?by=day&key=" + keyID + "&limit=500&model=a%2Fb&since=2026-11-01T00%3A00%3A00Z&tenant=acme&until=2026-11-30T08%3A00%3A00Z&user=ada%40example.com",
			"DAY    REQUESTS  PROMPT TOKENS  COMPLETION TOKENS  COST IN CENTS\n" +
				"-          1200          50000                  7       12.50175\n" +
				"-             1              0                  0        0.00000\n" +
				"TOTAL      1201          50000                  7       12.50175\n",
		},
		"csv": {
			[]string{"--csv", "--by", "key"}, "GET /api/v1/usage?by=key&limit=500",
			"key,key_name,key_prefix,requests,prompt_tokens,completion_tokens,cost_cents\n" +
				keyID + ",laptop,sk-ownllm-ab12,1200,50000,7,12.50175\nkey_2,'=1+1,,1,0,0,0\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAdmin(t, map[string]any{"GET /api/v1/usage": page(usage...)})
			got := run(t, a.env(), append([]string{"usage"}, tc.args...)...)
			if diff := cmp.Diff(result{0, tc.want, ""}, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if diff := cmp.Diff([]string{tc.asked}, a.asked()); diff != "" {
				t.Errorf("requests, -want +got:\n%s", diff)
			}
		})
	}

	a := newAdmin(t, map[string]any{"GET /api/v1/usage": page(usage...)})
	got := run(t, a.env(), "usage", "--json")
	var report usageReport
	if err := json.Unmarshal([]byte(got.stdout), &report); err != nil || !strings.Contains(got.stdout, `"total":{"requests":1201,"prompt_tokens":50000,"completion_tokens":7,"cost_cents":12.50175}`) {
		t.Errorf("%v: %s", err, got.stdout)
	}
	if diff := cmp.Diff(usage, report.Data); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	a = newAdmin(t, map[string]any{"GET /api/v1/usage": page[adminapi.Usage]()})
	if got := run(t, a.env(), "usage"); got.code != ExitOK || !strings.HasSuffix(got.stdout, "0\n") {
		t.Errorf("nothing used: %+v", got)
	}
	if got := run(t, a.env(), "usage", "--json"); !strings.HasPrefix(got.stdout, `{"data":[],"total":{"requests":0,`) {
		t.Errorf("nothing used: %+v", got)
	}
}

func TestTotalStopsAtTheLargestNumber(t *testing.T) {
	most := adminapi.Usage{Requests: math.MaxInt64, PromptTokens: math.MaxInt64, CompletionTokens: math.MaxInt64, CostCents: math.MaxInt64}
	if got := total([]adminapi.Usage{most, most, {Requests: 1}}); got != most {
		t.Errorf("%+v", got)
	}
}

func TestSpan(t *testing.T) {
	const day = 24 * time.Hour
	for text, want := range map[string]time.Duration{
		"0s": 0, "1s": time.Second, "90m": 90 * time.Minute, "24h": day, "7d": 7 * day, "0d": 0, "1d12h": 36 * time.Hour, "1d1h1m1s": day + 3661*time.Second, "36600d": 36600 * day,
	} {
		var s Span
		if err := s.UnmarshalText([]byte(text)); err != nil || time.Duration(s) != want {
			t.Errorf("%s: %s, %v", text, time.Duration(s), err)
		}
	}
	for _, text := range []string{"", "d", "7", "-1h", "-1d", "1.5d", "1d-25h", "d7", "7dd", "7d7", "36601d", "99999999999d", "9999999h", "soon", "7D", "1h1d", "+1d"} {
		var s Span
		if err := s.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is taken for %s", text, time.Duration(s))
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0s", time.Second: "1s", time.Minute: "1m", time.Hour: "1h", 90 * time.Minute: "1h30m", 10 * time.Minute: "10m", 20 * time.Hour: "20h",
		day: "1d", 36 * time.Hour: "1d12h", day + time.Second: "1d1s", 100 * time.Second: "1m40s", time.Hour + time.Second: "1h0m1s",
	} {
		if got := Span(d).String(); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		want := Span(rapid.Int64Range(0, int64(36600*day)).Draw(t, "span"))
		var got Span
		if err := got.UnmarshalText([]byte(want.String())); err != nil || got != want {
			t.Fatalf("%s comes back as %s: %v", want, got, err)
		}
	})
}

func TestMoment(t *testing.T) {
	for text, want := range map[string]time.Time{
		"2026-11-01": time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), "2026-11-01T18:00:00Z": time.Date(2026, 11, 1, 18, 0, 0, 0, time.UTC),
		"2026-11-01T18:00:00.5+01:00": time.Date(2026, 11, 1, 17, 0, 0, 5e8, time.UTC),
		"24h":                         time.Now().Add(-24 * time.Hour), "7d": time.Now().Add(-7 * 24 * time.Hour), "0s": time.Now(),
	} {
		var m Moment
		if err := m.UnmarshalText([]byte(text)); err != nil || time.Time(m).Sub(want).Abs() > time.Minute {
			t.Errorf("%s: %s, %v", text, time.Time(m), err)
		}
	}
	for _, text := range []string{"", "now", "2026-13-01", "2026-11", "01.11.2026", "2026-11-01 18:00", "-1h"} {
		var m Moment
		if err := m.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is taken for %s", text, time.Time(m))
		}
	}
}
