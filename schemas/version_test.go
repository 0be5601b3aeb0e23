package schemas

import (
	"strings"
	"testing"
)

// TestVersionsAgree tries the rule itself, with versions that don't exist yet.
func TestVersionsAgree(t *testing.T) {
	first, second, third := Versions{1, 1}, Versions{1, 2}, Versions{2, 3}
	for _, tc := range []struct {
		name           string
		broker, worker Versions
		want           int // 0: none
		upgrade        string
	}{
		{"the same", first, first, 1, ""},
		{"a worker before the first", first, Versions{0, 0}, 0, "worker"},
		{"an older worker", second, first, 1, ""},
		{"a newer worker", first, second, 1, ""},
		{"a newer worker that can't go back", first, Versions{2, 2}, 0, "brokers"},
		{"a worker two behind", third, first, 0, "worker"},
		{"a worker two ahead", first, third, 0, "brokers"},
		{"one apart, later", third, second, 2, ""},
		{"no sense", first, Versions{2, 1}, 0, "brokers"},
	} {
		got, ok := tc.broker.Agree(tc.worker)
		if ok != (tc.want != 0) || ok && got != tc.want {
			t.Errorf("%s: agreed on %d, %t, want %d", tc.name, got, ok, tc.want)
		}
		if back, same := tc.worker.Agree(tc.broker); same != ok || back != got {
			t.Errorf("%s: the other way round %d, %t", tc.name, back, same)
		}
		if ok {
			continue
		}
		text := tc.broker.Refusal(tc.worker)
		_, advice, _ := strings.Cut(text, "Upgrade ")
		if !strings.Contains(advice, tc.upgrade) || !strings.Contains(text, tc.broker.String()) || !strings.Contains(text, tc.worker.String()) {
			t.Errorf("%s: %s", tc.name, text)
		}
	}
}

// This build is as its rule says: one version back, and none before the first.
func TestProtocol(t *testing.T) {
	if Protocol.Newest != ProtocolVersion || Protocol.Oldest < 1 || Protocol.Newest-Protocol.Oldest > 1 {
		t.Errorf("this build speaks %+v", Protocol)
	}
	if Protocol.Newest > 1 && Protocol.Oldest == Protocol.Newest {
		t.Errorf("this build doesn't speak version %d", Protocol.Newest-1)
	}
	for version, want := range map[int]bool{0: false, ProtocolVersion: true, ProtocolVersion + 1: false} {
		if Protocol.Speak(version) != want {
			t.Errorf("version %d is spoken: %t", version, !want)
		}
	}
	for version, want := range map[Versions]string{{1, 1}: "version 1", {1, 2}: "versions 1 and 2", {1, 3}: "versions 1 to 3"} {
		if version.String() != want {
			t.Errorf("%+v is %q", version, version)
		}
	}
	for _, tc := range []struct {
		hello Hello
		want  Versions
	}{{Hello{Version: 2}, Versions{2, 2}}, {Hello{Version: 2, Oldest: 1}, Versions{1, 2}}, {Hello{}, Versions{}}} {
		if got := tc.hello.Versions(); got != tc.want {
			t.Errorf("%+v speaks %+v", tc.hello, got)
		}
	}
}
