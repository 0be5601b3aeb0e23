package schemas

import "iter"

// JobShards is how many streams share the jobs. It is part of the protocol: edges, brokers
// and permissions each work out by themselves where an agent's jobs are.
//
// There is more than one because nats-server asks every consumer of a work queue, under the
// lock of its stream, whenever a message is acknowledged, and each agent has a consumer for
// each of its models. There aren't more because each is a Raft group in a cluster, and a
// folder with files of its own on a disk, in which nats-server begins a new one whenever the
// stream runs empty. The groups of consumers outnumber those of streams from 16 agents on.
const JobShards = 16

// JobShard is where the jobs of an agent are: FNV-1a of its id, in 32 bits, modulo JobShards,
// as two digits. It is a token of JobSubject, and the end of JobStream.
func JobShard(a AgentID) string {
	hash := uint32(2166136261)
	for i := range len(a) {
		hash = (hash ^ uint32(a[i])) * 16777619
	}
	return shardToken(hash % JobShards)
}

func shardToken(n uint32) string { return string([]byte{'0' + byte(n/10), '0' + byte(n%10)}) }

// JobStream is OWNLLM_JOBS_<shard>: the stream that the jobs of an agent are in.
func JobStream(a AgentID) string { return JobStreamPrefix + JobShard(a) }

// JobStreams are the streams that share the jobs, by name, and what each captures.
func JobStreams() iter.Seq2[string, string] {
	return func(yield func(name, subjects string) bool) {
		for n := range uint32(JobShards) {
			if !yield(JobStreamPrefix+shardToken(n), Prefix+"job."+shardToken(n)+".>") {
				return
			}
		}
	}
}
