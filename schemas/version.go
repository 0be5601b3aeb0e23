package schemas

import "fmt"

// ProtocolVersion is the version of the bus protocol that this build writes.
const ProtocolVersion = 1

// OldestProtocol is the oldest version that this build understands: the one before its
// own. There is none before the first.
const OldestProtocol = max(1, ProtocolVersion-1)

// Protocol is what this build speaks.
var Protocol = Versions{Oldest: OldestProtocol, Newest: ProtocolVersion}

// Versions are the versions of the bus protocol that a program speaks, from the oldest to
// the newest. Programs one version apart have one in common, so that a cluster can be
// upgraded while it runs: brokers and edges first, then the workers.
type Versions struct{ Oldest, Newest int }

// Speak reports whether a message of the version is understood.
func (v Versions) Speak(version int) bool { return v.Oldest <= version && version <= v.Newest }

// Agree returns the newest version that both sides speak, and false if there is none.
func (v Versions) Agree(other Versions) (int, bool) {
	version := min(v.Newest, other.Newest)
	return version, v.Speak(version) && other.Speak(version)
}

// Refusal says, for people, why a broker that speaks v and a worker that speaks other don't
// understand each other, and which of the two to upgrade.
func (v Versions) Refusal(worker Versions) string {
	which := "Upgrade this machine's worker"
	if worker.Oldest > v.Newest {
		which = "Upgrade the brokers and edges"
	}
	return fmt.Sprintf("The brokers speak %s of the bus protocol, and this worker %s. %s: releases may be one version apart, and no more.",
		v, worker, which)
}

// String names the versions for people.
func (v Versions) String() string {
	switch {
	case v.Oldest == v.Newest:
		return fmt.Sprintf("version %d", v.Newest)
	case v.Oldest+1 == v.Newest:
		return fmt.Sprintf("versions %d and %d", v.Oldest, v.Newest)
	}
	return fmt.Sprintf("versions %d to %d", v.Oldest, v.Newest)
}

// Versions are those that the worker speaks. A hello that states no oldest version is of a
// worker that speaks only one.
func (h Hello) Versions() Versions {
	if h.Oldest == 0 {
		return Versions{h.Version, h.Version}
	}
	return Versions{h.Oldest, h.Version}
}
