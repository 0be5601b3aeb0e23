package schemas

import (
	"strings"
	"testing"
)

func TestPublisherSubjects(t *testing.T) {
	const (
		key     = KeyID("key_1")
		owner   = OwnerID("own_2")
		request = RequestID("req_3")
	)
	for got, want := range map[string]string{
		InSubject(key, OperationChat):        "ownllm.v1.in.key_1.chat",
		InSubject("0aff", OperationWhoami):   "ownllm.v1.in.0aff.whoami",
		InWildcard(OperationModels):          "ownllm.v1.in.*.models",
		InAny:                                "ownllm.v1.in.*.*",
		ProgressSubject(key, owner, request): "ownllm.v1.in.key_1.progress.own_2.req_3",
		ProgressWildcard(owner):              "ownllm.v1.in.*.progress.own_2.*",
		ResultSubject(key, "order 7"):        "ownllm.v1.res.key_1.order=207",
		ResultWildcard(key):                  "ownllm.v1.res.key_1.>",
		PublisherInboxPrefix(key):            "_INBOX_key_1",
		PeerCancelSubject(key, request):      "ownllm.v1.peer.cancel.key_1.req_3",
		PeerCancelWildcard:                   "ownllm.v1.peer.cancel.*.*",
	} {
		if got != want {
			t.Errorf("subject %q, want %q", got, want)
		}
	}
}

func TestPublisherSubjectsOfHostileNames(t *testing.T) {
	for _, x := range hostile {
		for _, y := range hostile {
			key, owner, request := KeyID(x), OwnerID(y), RequestID(x)
			in, progress, peer := InSubject(key, y), ProgressSubject(key, owner, request), PeerCancelSubject(key, request)
			for _, s := range []struct {
				subject string
				tokens  int
				within  string
			}{
				{in, 4, InAny},
				{in, 4, InWildcard(y)},
				{progress, 6, ProgressWildcard(owner)},
				{ResultSubject(key, y), 4, ResultWildcard(key)},
				{peer, 5, PeerCancelWildcard},
				{PublisherInboxPrefix(key), 1, ""},
			} {
				tokens := strings.Split(strings.TrimPrefix(s.subject, "ownllm."), ".")
				if s.within == "" {
					tokens = strings.Split(s.subject, ".")
				}
				if len(tokens) != s.tokens {
					t.Fatalf("%q has %d tokens, want %d", s.subject, len(tokens), s.tokens)
				}
				for _, token := range tokens {
					checkToken(t, strings.TrimPrefix(token, inboxBegin))
				}
				if s.within != "" && !matches(s.within, s.subject) {
					t.Errorf("%q isn't within %q", s.subject, s.within)
				}
			}
			if matches(InAny, progress) {
				t.Errorf("%q is taken for an operation", progress)
			}
			if k, operation, err := ParseInSubject(in); err != nil || k != key || operation != y {
				t.Errorf("ParseInSubject(%q) = %q, %q, %v", in, k, operation, err)
			}
			if k, o, r, err := ParseProgressSubject(progress); err != nil || k != key || o != owner || r != request {
				t.Errorf("ParseProgressSubject(%q) = %q, %q, %q, %v", progress, k, o, r, err)
			}
			if k, r, err := ParsePeerCancelSubject(peer); err != nil || k != key || r != request {
				t.Errorf("ParsePeerCancelSubject(%q) = %q, %q, %v", peer, k, r, err)
			}
		}
	}
}

func TestPublisherSubjectsRefused(t *testing.T) {
	for _, subject := range []string{
		"", "ownllm.v1.in", "ownllm.v1.in.", "ownllm.v1.in.k", "ownllm.v1.in.k.", "ownllm.v1.in..chat", "ownllm.v1.in.k.chat.x", "ownllm.v2.in.k.chat",
		"xownllm.v1.in.k.chat", "ownllm.v1.out.k.chat", "ownllm.v1.in.*.chat", "ownllm.v1.in.k.>", "ownllm.v1.in.=6B.chat",
	} {
		if k, operation, err := ParseInSubject(subject); err == nil || k != "" || operation != "" {
			t.Errorf("ParseInSubject(%q) = %q, %q, %v", subject, k, operation, err)
		}
	}
	for _, subject := range []string{
		"", "ownllm.v1.in.k.progress.o", "ownllm.v1.in.k.progress.o.r.x", "ownllm.v1.in.k.chat.o.r", "ownllm.v1.in.k.progress..r", "ownllm.v1.peer.k.progress.o.r",
	} {
		if k, o, r, err := ParseProgressSubject(subject); err == nil || k != "" || o != "" || r != "" {
			t.Errorf("ParseProgressSubject(%q) = %q, %q, %q, %v", subject, k, o, r, err)
		}
	}
	for _, subject := range []string{"", "ownllm.v1.peer.cancel.k", "ownllm.v1.peer.cancel.k.r.x", "ownllm.v1.in.k.r", "ownllm.v1.peer.cancel..r"} {
		if k, r, err := ParsePeerCancelSubject(subject); err == nil || k != "" || r != "" {
			t.Errorf("ParsePeerCancelSubject(%q) = %q, %q, %v", subject, k, r, err)
		}
	}
}

func TestPublisherAnswersTo(t *testing.T) {
	const key = KeyID("key_1")
	chat := InSubject(key, OperationChat)
	for _, c := range []struct {
		subject, reply string
		want           bool
	}{
		{chat, "_INBOX_key_1.a", true},
		{chat, "_INBOX_key_1.a.b", true},
		{chat, ResultSubject(key, "7"), true},
		{ProgressSubject(key, "own_2", "req_3"), "_INBOX_key_1.a", true},
		{InSubject("0aff", OperationWhoami), "_INBOX_0aff.a", true},
		{chat, "", false},
		{chat, "_INBOX_key_1", false},
		{chat, "_INBOX_key_1.", false},
		{chat, "_INBOX_key_1.>", false},
		{chat, "_INBOX_key_1.*", false},
		{chat, "_INBOX_key_1..a", false},
		{chat, "_INBOX_key_1.a b", false},
		{chat, "_INBOX_key_12.a", false},
		{chat, "_INBOX_key_2.a", false},
		{chat, "_INBOX_agt_1.a", false},
		{chat, "_INBOX.a", false},
		{chat, InSubject("key_2", OperationChat), false},
		{chat, ResultSubject("key_2", "7"), false},
		{chat, PeerCancelSubject(key, "req_3"), false},
		{"ownllm.v1.in.key_1", "_INBOX_key_1.a", false},
		{"ownllm.v1.in..chat", "_INBOX_.a", false},
		{"ownllm.v1.ctl.key_1.chat", "_INBOX_key_1.a", false},
	} {
		if got := PublisherAnswersTo(c.subject, c.reply); got != c.want {
			t.Errorf("PublisherAnswersTo(%q, %q) = %v", c.subject, c.reply, got)
		}
	}
}

func FuzzParsePublisherSubject(f *testing.F) {
	for _, s := range []string{"", "ownllm.v1.in.key_1.chat", "ownllm.v1.in.k.progress.o.r", "ownllm.v1.peer.cancel.k.r", "ownllm.v1.in.=.=", "ownllm.v1.in.=2E.=2A"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, subject string) {
		if k, operation, err := ParseInSubject(subject); err == nil && InSubject(k, operation) != subject {
			t.Errorf("%q means %q and %q, whose subject is another", subject, k, operation)
		}
		if k, o, r, err := ParseProgressSubject(subject); err == nil && ProgressSubject(k, o, r) != subject {
			t.Errorf("%q means %q, %q and %q, whose subject is another", subject, k, o, r)
		}
		if k, r, err := ParsePeerCancelSubject(subject); err == nil && PeerCancelSubject(k, r) != subject {
			t.Errorf("%q means %q and %q, whose subject is another", subject, k, r)
		}
	})
}
