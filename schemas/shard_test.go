package schemas

import "testing"

// Where an agent's jobs are is part of the protocol: it may not change unnoticed.
func TestJobShardStays(t *testing.T) {
	for agent, want := range map[AgentID]string{
		"": "05", "agt_2": "06", "agt_a.b": "15", "agt_01K000000000000000000000ZZ": "04", "模型": "10",
	} {
		if got := JobShard(agent); got != want {
			t.Errorf("shard of %q is %s, want %s", agent, got, want)
		}
	}
}

// Every job falls into one stream, that of its agent, and agents fall evenly.
func TestJobStreamsShareAllJobs(t *testing.T) {
	streams := map[string]string{}
	for name, subjects := range JobStreams() {
		streams[name] = subjects
	}
	if len(streams) != JobShards {
		t.Fatalf("there are %d streams, want %d", len(streams), JobShards)
	}
	const each = 1000
	agents := map[string]int{}
	for i := range each * JobShards {
		agent := NewAgentID()
		if i < len(hostile) {
			agent = AgentID(hostile[i])
		}
		subject := JobSubject("ten_1", agent, "m")
		for name, subjects := range streams {
			if is := name == JobStream(agent); matches(subjects, subject) != is {
				t.Fatalf("%q is in the stream %s: %v, want %v", subject, name, !is, is)
			}
		}
		agents[JobStream(agent)]++
	}
	for name := range streams {
		if n := agents[name]; n < each*3/4 || n > each*5/4 {
			t.Errorf("%s has %d agents of %d", name, n, each*JobShards)
		}
	}
}
