package schemas

import (
	"slices"
	"strings"
	"testing"
)

func TestNewIDs(t *testing.T) {
	for prefix, fresh := range map[string]func() string{
		"ten_": func() string { return string(NewTenantID()) },
		"usr_": func() string { return string(NewUserID()) },
		"key_": func() string { return string(NewKeyID()) },
		"agt_": func() string { return string(NewAgentID()) },
		"pai_": func() string { return string(NewPairingID()) },
		"req_": func() string { return string(NewRequestID()) },
		"own_": func() string { return string(NewOwnerID()) },
		"inc_": func() string { return string(NewIncarnation()) },
	} {
		var ids []string
		for range 1000 {
			id := fresh()
			if err := ValidateID(id, prefix); err != nil {
				t.Fatal(err)
			}
			if EncodeToken(id) != id {
				t.Fatalf("id %q isn't a subject token", id)
			}
			ids = append(ids, id)
		}
		// Incarnations are compared: a later one has to sort after an earlier one, even
		// within a millisecond.
		if !slices.IsSorted(ids) || len(slices.Compact(ids)) != 1000 {
			t.Errorf("ids %s don't sort by the time they were made", prefix)
		}
	}
}

func TestValidateIDRefuses(t *testing.T) {
	good := string(NewTenantID())
	for _, id := range []string{
		"", "ten_", strings.TrimPrefix(good, "ten_"), good + "0", good[:len(good)-1], "usr_" + good[4:], " " + good, good + " ",
		"TEN_" + good[4:], "ten_" + good, "ten_8" + good[5:], "ten_" + strings.Repeat("U", 26), "ten_" + strings.Repeat("é", 13),
	} {
		if ValidateID(id, "ten_") == nil {
			t.Errorf("id %q is taken for a tenant's", id)
		}
	}
}

func TestCompletionID(t *testing.T) {
	id := NewRequestID()
	got := id.CompletionID()
	if want := "chatcmpl-" + string(id[len("req_"):]); got != want {
		t.Errorf("completion id %q, want %q", got, want)
	}
	if RequestID("abc").CompletionID() != "chatcmpl-abc" {
		t.Error("a request id of another shape is lost")
	}
}

func TestNewNonce(t *testing.T) {
	seen := map[Nonce]bool{}
	ones := make([]int, 256)
	for range 10000 {
		n := NewNonce()
		if len(n) != 22 || !plainToken(string(n)) || seen[n] {
			t.Fatalf("nonce %q", n)
		}
		seen[n] = true
		ones[n[0]]++
	}
	for c, count := range ones {
		// 10,000 / 64 is 156; a fixed or counted first byte is far from it.
		if count > 300 {
			t.Errorf("%d of 10000 nonces begin with %q", count, rune(c))
		}
	}
}

func FuzzValidateID(f *testing.F) {
	f.Add("ten_01K00000000000000000000000")
	f.Add("ten_")
	f.Fuzz(func(t *testing.T, id string) {
		if ValidateID(id, "ten_") == nil && EncodeToken(id) != id {
			t.Errorf("id %q is valid and isn't a subject token", id)
		}
	})
}
