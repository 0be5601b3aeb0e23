package schemas

import (
	"strings"
	"testing"
)

// hostile holds names that would break a subject, or get out of it, if they were put
// in as they are.
var hostile = []string{
	"qwen/qwen2.5:32b", "a.b>*", "", "*", ">", ".", "..", "a.", ".a", "$JS.API.>", "=", "=2E",
	" ", "a b", "\t", "\r\n", "PUB x 1\r\ny\r\n", "\x00", "ünï/çødé", "模型:7b", "\xff\xfe",
	strings.Repeat("x.", 200),
}

func TestSubjects(t *testing.T) {
	const (
		tenant = TenantID("ten_1")
		agent  = AgentID("agt_2")
		owner  = OwnerID("own_3")
		nonce  = Nonce("Nn-_4")
	)
	for got, want := range map[string]string{
		JobSubject(tenant, agent, "m"):                "ownllm.v1.job.06.ten_1.agt_2.m",
		JobSubject(tenant, agent, "qwen/qwen2.5:32b"): "ownllm.v1.job.06.ten_1.agt_2.qwen=2Fqwen2=2E5=3A32b",
		JobSubject("", "", ""):                        "ownllm.v1.job.05.=.=.=",
		JobTenantWildcard(tenant):                     "ownllm.v1.job.*.ten_1.>",
		OutSubject(agent, owner, nonce):               "ownllm.v1.out.agt_2.own_3.Nn-_4",
		OutWildcard(owner):                            "ownllm.v1.out.*.own_3.*",
		BodySubject(agent, owner, nonce):              "ownllm.v1.body.agt_2.own_3.Nn-_4",
		BodyWildcard(owner):                           "ownllm.v1.body.*.own_3.*",
		ControlSubject(agent):                         "ownllm.v1.ctl.agt_2",
		HeartbeatSubject(tenant, agent):               "ownllm.v1.hb.ten_1.agt_2",
		HelloSubject(tenant, agent):                   "ownllm.v1.hello.ten_1.agt_2",
		AsideSubject(tenant, agent):                   "ownllm.v1.aside.ten_1.agt_2",
		UsageSubject(tenant, agent):                   "ownllm.v1.usage.ten_1.agt_2",
		AgentInbox("_INBOX.abc", tenant, agent):       "_INBOX.abc.ten_1.agt_2",
		HeartbeatWildcard:                             "ownllm.v1.hb.>",
		HelloWildcard:                                 "ownllm.v1.hello.*.*",
		JobSubjects:                                   "ownllm.v1.job.>",
		UsageSubjects:                                 "ownllm.v1.usage.>",
	} {
		if got != want {
			t.Errorf("subject %q, want %q", got, want)
		}
	}
}

// Whatever a name holds, a subject has as many tokens as its pattern, and nothing in
// it that NATS would read as a wildcard.
func TestSubjectsOfHostileNames(t *testing.T) {
	for _, x := range hostile {
		for _, y := range hostile {
			tenant, agent, owner, nonce := TenantID(x), AgentID(y), OwnerID(x), Nonce(y)
			for _, s := range []struct {
				subject string
				tokens  int
				within  string // a wildcard that must hold the subject
			}{
				{JobSubject(tenant, agent, x), 7, JobTenantWildcard(tenant)},
				{OutSubject(agent, owner, nonce), 6, OutWildcard(owner)},
				{BodySubject(agent, owner, nonce), 6, BodyWildcard(owner)},
				{ControlSubject(agent), 4, ""},
				{HeartbeatSubject(tenant, agent), 5, HeartbeatWildcard},
				{HelloSubject(tenant, agent), 5, HelloWildcard},
				{AsideSubject(tenant, agent), 5, AsideWildcard},
				{UsageSubject(tenant, agent), 5, UsageSubjects},
				{AgentInbox("_INBOX.abc", tenant, agent), 4, "_INBOX.abc.*.*"},
			} {
				tokens := strings.Split(s.subject, ".")
				if len(tokens) != s.tokens {
					t.Fatalf("%q has %d tokens, want %d", s.subject, len(tokens), s.tokens)
				}
				for _, token := range tokens {
					checkToken(t, token)
				}
				if s.within != "" && !matches(s.within, s.subject) {
					t.Errorf("%q isn't within %q", s.subject, s.within)
				}
			}
		}
	}
}

// Two different triples of names never share a queue, however the names are cut.
func TestJobSubjectIsInjective(t *testing.T) {
	seen := map[string][3]string{}
	names := append([]string{"a", "a.a", "a=2Ea", "A"}, hostile...)
	for _, x := range names {
		for _, y := range names {
			for _, z := range names {
				subject := JobSubject(TenantID(x), AgentID(y), z)
				if other, ok := seen[subject]; ok {
					t.Fatalf("%q is the queue of %q and of %q", subject, other, [3]string{x, y, z})
				}
				seen[subject] = [3]string{x, y, z}
			}
		}
	}
}

func TestJobTenantWildcardHoldsNoOther(t *testing.T) {
	for _, x := range hostile {
		for _, y := range hostile {
			if x != y && matches(JobTenantWildcard(TenantID(x)), JobSubject(TenantID(y), "a", "m")) {
				t.Errorf("jobs of %q are within those of %q", y, x)
			}
		}
	}
}

func TestAgentSubjectsParse(t *testing.T) {
	const inbox = "_INBOX.abc"
	for _, x := range hostile {
		for _, y := range hostile {
			tenant, agent := TenantID(x), AgentID(y)
			for _, subject := range []string{HeartbeatSubject(tenant, agent), HelloSubject(tenant, agent), AsideSubject(tenant, agent), UsageSubject(tenant, agent)} {
				gotTenant, gotAgent, err := ParseAgentSubject(subject)
				if err != nil || gotTenant != tenant || gotAgent != agent {
					t.Errorf("ParseAgentSubject(%q) = %q, %q, %v", subject, gotTenant, gotAgent, err)
				}
			}
			subject := AgentInbox(inbox, tenant, agent)
			gotTenant, gotAgent, err := ParseAgentInbox(inbox, subject)
			if err != nil || gotTenant != tenant || gotAgent != agent {
				t.Errorf("ParseAgentInbox(%q) = %q, %q, %v", subject, gotTenant, gotAgent, err)
			}
		}
	}
}

func TestAgentSubjectsRefused(t *testing.T) {
	for _, subject := range []string{
		"", "ownllm", "ownllm.v1.", "ownllm.v1.hb", "ownllm.v1.hb.", "ownllm.v1.hb.t", "ownllm.v1.hb.t.", "ownllm.v1.hb..a",
		"ownllm.v1.hb.t.a.b", "ownllm.v1.hb.t.a.", "ownllm.v1.hello.t", "ownllm.v1.ctl.t.a", "ownllm.v1.job.t.a", "ownllm.v1.HB.t.a",
		"ownllm.v2.hb.t.a", "xownllm.v1.hb.t.a", "ownllm.v1.hb.t.*", "ownllm.v1.hb.>", "ownllm.v1.hb.=2e.a", "ownllm.v1.hb.t.=41",
		"ownllm.v1.hb.t/a.b", "ownllm.v1.hb.t.a b", "ownllm.v1.usage.t",
	} {
		if tenant, agent, err := ParseAgentSubject(subject); err == nil || tenant != "" || agent != "" {
			t.Errorf("ParseAgentSubject(%q) = %q, %q, %v", subject, tenant, agent, err)
		}
	}
	for _, subject := range []string{"", "_INBOX.abc", "_INBOX.abc.", "_INBOX.abc.t", "_INBOX.abcd.t.a", "_INBOX.abc.t.a.b", "_INBOX.abc.t.", "x._INBOX.abc.t.a"} {
		if tenant, agent, err := ParseAgentInbox("_INBOX.abc", subject); err == nil || tenant != "" || agent != "" {
			t.Errorf("ParseAgentInbox(%q) = %q, %q, %v", subject, tenant, agent, err)
		}
	}
}

func TestLastToken(t *testing.T) {
	nonce := NewNonce()
	for subject, want := range map[string]string{
		OutSubject("a", "o", nonce):    string(nonce),
		BodySubject("a.b", "o", nonce): string(nonce),
		"":                             "",
		"one":                          "one",
		"a.":                           "",
	} {
		if got := LastToken(subject); got != want {
			t.Errorf("LastToken(%q) = %q, want %q", subject, got, want)
		}
	}
}

// matches is what NATS does with a wildcard.
func matches(wildcard, subject string) bool {
	w, s := strings.Split(wildcard, "."), strings.Split(subject, ".")
	for i := range w {
		switch {
		case w[i] == ">":
			return len(s) > i
		case i >= len(s) || w[i] != "*" && w[i] != s[i]:
			return false
		}
	}
	return len(w) == len(s)
}

func FuzzParseAgentSubject(f *testing.F) {
	for _, s := range []string{"", "ownllm.v1.hb.ten_1.agt_2", "ownllm.v1.hello.=.=", "ownllm.v1.usage.t.a", "ownllm.v1.hb.t.a.b", "ownllm.v1.hb.=2E.=2A"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, subject string) {
		tenant, agent, err := ParseAgentSubject(subject)
		if err != nil {
			return
		}
		if subject != HeartbeatSubject(tenant, agent) && subject != HelloSubject(tenant, agent) && subject != AsideSubject(tenant, agent) && subject != UsageSubject(tenant, agent) {
			t.Errorf("%q means tenant %q and agent %q, whose subjects are others", subject, tenant, agent)
		}
	})
}
