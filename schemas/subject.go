package schemas

import (
	"fmt"
	"strings"
)

// Prefix begins every subject of the protocol.
const Prefix = "ownllm.v1."

// The streams of JetStream.
const (
	// JobStreamPrefix begins the names of the work queues of admitted jobs, see JobStream.
	JobStreamPrefix = "OWNLLM_JOBS_"
	// JobSubjects is what all of them capture.
	JobSubjects = Prefix + "job.>"
	// UsageStream holds what workers report of requests whose owner is gone.
	UsageStream = "OWNLLM_USAGE"
	// UsageSubjects is what UsageStream captures.
	UsageSubjects = Prefix + "usage.>"
)

// JobSubject is ownllm.v1.job.<shard>.<tenant>.<agent>.<model>: the owner of a request
// publishes, JobStream(a) stores, the worker of that agent pulls. One exact subject
// is one bounded queue. The shard is JobShard(a).
func JobSubject(t TenantID, a AgentID, model string) string {
	return Prefix + "job." + JobShard(a) + "." + EncodeToken(string(t)) + "." + EncodeToken(string(a)) + "." + EncodeToken(model)
}

// JobTenantWildcard is ownllm.v1.job.*.<tenant>.>: all queues of one tenant.
func JobTenantWildcard(t TenantID) string {
	return Prefix + "job.*." + EncodeToken(string(t)) + ".>"
}

// OutSubject is ownllm.v1.out.<agent>.<owner>.<nonce>: the frames of one attempt,
// from the worker to the owner of the request.
func OutSubject(a AgentID, o OwnerID, n Nonce) string {
	return Prefix + "out." + EncodeToken(string(a)) + "." + EncodeToken(string(o)) + "." + EncodeToken(string(n))
}

// OutWildcard is ownllm.v1.out.*.<owner>.*: all frames for one owner.
func OutWildcard(o OwnerID) string {
	return Prefix + "out.*." + EncodeToken(string(o)) + ".*"
}

// BundleSubject is ownllm.v1.out.<agent>.<owner>.=: bundles of frames of several attempts,
// from the worker to the owner of all of them. It is no OutSubject, since no nonce is empty,
// and is like one to permissions and subscriptions.
func BundleSubject(a AgentID, o OwnerID) string { return OutSubject(a, o, "") }

// IsBundle reports whether a subject that OutWildcard matches is a BundleSubject.
func IsBundle(subject string) bool { return strings.HasSuffix(subject, ".=") }

// BodySubject is ownllm.v1.body.<agent>.<owner>.<nonce>: a worker asks the owner for
// a piece of a request body that is too large to travel in the job.
func BodySubject(a AgentID, o OwnerID, n Nonce) string {
	return Prefix + "body." + EncodeToken(string(a)) + "." + EncodeToken(string(o)) + "." + EncodeToken(string(n))
}

// BodyWildcard is ownllm.v1.body.*.<owner>.*: all body requests to one owner.
func BodyWildcard(o OwnerID) string {
	return Prefix + "body.*." + EncodeToken(string(o)) + ".*"
}

// LastToken returns the last token of a subject, undecoded: the nonce of an out or
// body subject.
func LastToken(subject string) string {
	return subject[strings.LastIndexByte(subject, '.')+1:]
}

// CutLastToken cuts a subject in front of its last token, behind the dot.
func CutLastToken(subject string) (before, last string) {
	i := strings.LastIndexByte(subject, '.') + 1
	return subject[:i], subject[i:]
}

// AgentInboxPrefix is _INBOX_<agent>: every reply subject of a worker begins with it.
func AgentInboxPrefix(a AgentID) string { return inboxBegin + EncodeToken(string(a)) }

const inboxBegin = "_INBOX_"

// AnswersTo reports whether a message of an agent may be answered: whether its reply
// subject is in the inbox of the agent that its subject names. The bus checks who may
// publish to a subject, but not which reply subject goes with it, and what it publishes
// itself in answer to somebody, it publishes anywhere.
func AnswersTo(subject, reply string) bool {
	rest, ok := strings.CutPrefix(subject, Prefix)
	kind, rest, _ := strings.Cut(rest, ".")
	if kind != "out" && kind != "body" {
		_, rest, _ = strings.Cut(rest, ".") // the tenant
	}
	agent, _, _ := strings.Cut(rest, ".")
	to, of := strings.CutPrefix(reply, inboxBegin)
	to, is := strings.CutPrefix(to, agent)
	return ok && of && is && agent != "" && len(to) > 1 && to[0] == '.'
}

// InSubject is ownllm.v1.in.<key>.<operation>: a publisher asks the brokers for something.
// The key is the id of its API key, which the bus has checked. A publisher that doesn't know
// the id may ask whoami with the fingerprint of its secret in its place: the SHA-256, as 64
// hex digits.
func InSubject(k KeyID, operation string) string {
	return Prefix + "in." + EncodeToken(string(k)) + "." + EncodeToken(operation)
}

// InWildcard is ownllm.v1.in.*.<operation>: what all publishers ask of one operation.
func InWildcard(operation string) string { return Prefix + "in.*." + EncodeToken(operation) }

// InAny is ownllm.v1.in.*.*: all that publishers ask, of operations that don't exist, too.
const InAny = Prefix + "in.*.*"

// ParseInSubject is the inverse of InSubject.
func ParseInSubject(subject string) (k KeyID, operation string, err error) {
	tokens, err := parse(subject, "in.", 2)
	if err != nil {
		return "", "", err
	}
	return KeyID(tokens[0]), tokens[1], nil
}

// ProgressSubject is ownllm.v1.in.<key>.progress.<owner>.<request>: what a publisher says
// to a progress frame of its request, and where the bus says that nobody hears its frames.
func ProgressSubject(k KeyID, o OwnerID, r RequestID) string {
	return Prefix + "in." + EncodeToken(string(k)) + ".progress." + EncodeToken(string(o)) + "." + EncodeToken(string(r))
}

// ProgressWildcard is ownllm.v1.in.*.progress.<owner>.*: what is said to the progress frames
// of one owner.
func ProgressWildcard(o OwnerID) string {
	return Prefix + "in.*.progress." + EncodeToken(string(o)) + ".*"
}

// ParseProgressSubject is the inverse of ProgressSubject.
func ParseProgressSubject(subject string) (k KeyID, o OwnerID, r RequestID, err error) {
	tokens, err := parse(subject, "in.", 4)
	if err != nil {
		return "", "", "", err
	}
	if tokens[1] != "progress" {
		return "", "", "", fmt.Errorf("subject %q isn't of progress", subject)
	}
	return KeyID(tokens[0]), OwnerID(tokens[2]), RequestID(tokens[3]), nil
}

// ResultSubject is ownllm.v1.res.<key>.<id>: the brokers push the result of a request that
// its publisher submitted under that id.
func ResultSubject(k KeyID, id string) string {
	return Prefix + "res." + EncodeToken(string(k)) + "." + EncodeToken(id)
}

// ResultWildcard is ownllm.v1.res.<key>.>: all results for one key.
func ResultWildcard(k KeyID) string { return Prefix + "res." + EncodeToken(string(k)) + ".>" }

// ResultAny is ownllm.v1.res.*.*: all results.
const ResultAny = Prefix + "res.*.*"

// ParseResultSubject is the inverse of ResultSubject.
func ParseResultSubject(subject string) (k KeyID, id string, err error) {
	tokens, err := parse(subject, "res.", 2)
	if err != nil {
		return "", "", err
	}
	return KeyID(tokens[0]), tokens[1], nil
}

// PublisherInboxPrefix is _INBOX_<key>: every reply subject of a publisher begins with it.
// The fingerprint of its secret may stand in for the key, see InSubject.
func PublisherInboxPrefix(k KeyID) string { return inboxBegin + EncodeToken(string(k)) }

// PublisherAnswersTo reports whether a message of a publisher may be answered: whether its
// reply subject is in the inbox, or among the results, of the key that its subject names. As
// AnswersTo says of agents, the bus doesn't check that.
func PublisherAnswersTo(subject, reply string) bool {
	rest, ok := strings.CutPrefix(subject, Prefix+"in.")
	key, _, more := strings.Cut(rest, ".")
	if !ok || !more || key == "" || !concrete(reply) {
		return false
	}
	return strings.HasPrefix(reply, inboxBegin+key+".") || strings.HasPrefix(reply, Prefix+"res."+key+".")
}

// concrete reports whether a subject can be published to: it has no empty token and no
// wildcard.
func concrete(subject string) bool {
	for token := range strings.SplitSeq(subject, ".") {
		if token == "" || strings.ContainsAny(token, "*> \t\r\n") {
			return false
		}
	}
	return true
}

// PeerCancelSubject is ownllm.v1.peer.cancel.<key>.<request>: a broker asks the others to
// cancel a request of a key. Publishers can't reach it.
func PeerCancelSubject(k KeyID, r RequestID) string {
	return Prefix + "peer.cancel." + EncodeToken(string(k)) + "." + EncodeToken(string(r))
}

// PeerCancelWildcard is ownllm.v1.peer.cancel.*.*: every such question.
const PeerCancelWildcard = Prefix + "peer.cancel.*.*"

// ParsePeerCancelSubject is the inverse of PeerCancelSubject.
func ParsePeerCancelSubject(subject string) (KeyID, RequestID, error) {
	tokens, err := parse(subject, "peer.cancel.", 2)
	if err != nil {
		return "", "", err
	}
	return KeyID(tokens[0]), RequestID(tokens[1]), nil
}

// parse returns the n decoded tokens of a subject behind Prefix and kind.
func parse(subject, kind string, n int) ([]string, error) {
	rest, ok := strings.CutPrefix(subject, Prefix+kind)
	if !ok {
		return nil, fmt.Errorf("subject %q is outside %q", subject, Prefix+kind)
	}
	tokens := strings.Split(rest, ".")
	if len(tokens) != n {
		return nil, fmt.Errorf("subject %q has %d tokens behind %q, want %d", subject, len(tokens), Prefix+kind, n)
	}
	for i, token := range tokens {
		var err error
		if tokens[i], err = DecodeToken(token); err != nil {
			return nil, fmt.Errorf("subject %q: %w", subject, err)
		}
	}
	return tokens, nil
}

// ControlSubject is ownllm.v1.ctl.<agent>: requests from owners to a live worker.
// No responder means that no worker of that agent is connected.
func ControlSubject(a AgentID) string { return Prefix + "ctl." + EncodeToken(string(a)) }

// HeartbeatSubject is ownllm.v1.hb.<tenant>.<agent>: a worker's heartbeat, to every
// edge and broker.
func HeartbeatSubject(t TenantID, a AgentID) string {
	return Prefix + "hb." + EncodeToken(string(t)) + "." + EncodeToken(string(a))
}

// HeartbeatWildcard is ownllm.v1.hb.>: every heartbeat.
const HeartbeatWildcard = Prefix + "hb.>"

// AsideSubject is ownllm.v1.aside.<tenant>.<agent>: a heartbeat that a worker sent over
// HTTPS, because it has no link to the bus, from the edge that got it to every other.
func AsideSubject(t TenantID, a AgentID) string {
	return Prefix + "aside." + EncodeToken(string(t)) + "." + EncodeToken(string(a))
}

// AsideWildcard is ownllm.v1.aside.*.*: every heartbeat over HTTPS.
const AsideWildcard = Prefix + "aside.*.*"

// HelloSubject is ownllm.v1.hello.<tenant>.<agent>: a worker tells the brokers, by
// request, which models it offers, and hears which consumers to pull from.
func HelloSubject(t TenantID, a AgentID) string {
	return Prefix + "hello." + EncodeToken(string(t)) + "." + EncodeToken(string(a))
}

// HelloWildcard is ownllm.v1.hello.*.*: every hello.
const HelloWildcard = Prefix + "hello.*.*"

// ParseAgentSubject splits the subject of a heartbeat, a hello or a usage report into the
// tenant and the agent that it names. The subject is what permissions are enforced on, so it,
// and never the payload, says who speaks.
func ParseAgentSubject(subject string) (TenantID, AgentID, error) {
	rest, ok := strings.CutPrefix(subject, Prefix)
	if !ok {
		return "", "", fmt.Errorf("subject %q is outside %q", subject, Prefix)
	}
	kind, rest, ok := strings.Cut(rest, ".")
	if !ok || kind != "hb" && kind != "hello" && kind != "usage" && kind != "aside" {
		return "", "", fmt.Errorf("subject %q isn't of an agent", subject)
	}
	return parseAgent(rest)
}

// UsageSubject is ownllm.v1.usage.<tenant>.<agent>: what a worker counted of a request
// whose owner is gone, to the brokers. UsageStream stores it.
func UsageSubject(t TenantID, a AgentID) string {
	return Prefix + "usage." + EncodeToken(string(t)) + "." + EncodeToken(string(a))
}

// AgentInbox is <inbox>.<tenant>.<agent>: a reply subject that says whose answer
// comes to it.
func AgentInbox(inbox string, t TenantID, a AgentID) string {
	return inbox + "." + EncodeToken(string(t)) + "." + EncodeToken(string(a))
}

// ParseAgentInbox is the inverse of AgentInbox.
func ParseAgentInbox(inbox, subject string) (TenantID, AgentID, error) {
	rest, ok := strings.CutPrefix(subject, inbox+".")
	if !ok {
		return "", "", fmt.Errorf("subject %q is outside %q", subject, inbox)
	}
	return parseAgent(rest)
}

func parseAgent(tokens string) (TenantID, AgentID, error) {
	first, second, ok := strings.Cut(tokens, ".")
	if !ok {
		return "", "", fmt.Errorf("%q isn't a tenant and an agent", tokens)
	}
	t, err := DecodeToken(first)
	if err != nil {
		return "", "", fmt.Errorf("tenant: %w", err)
	}
	a, err := DecodeToken(second)
	if err != nil {
		return "", "", fmt.Errorf("agent: %w", err)
	}
	return TenantID(t), AgentID(a), nil
}

const upperHex = "0123456789ABCDEF"

func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-'
}

// plainToken reports whether s isn't empty and holds only plain bytes, so that neither
// a subject nor JSON changes it.
func plainToken[T string | []byte](s T) bool {
	for i := range len(s) {
		if !plain(s[i]) {
			return false
		}
	}
	return len(s) > 0
}

// EncodeToken makes one subject token of any string: letters, digits, '_' and '-'
// stay, every other byte becomes '=' and two upper-case hex digits, and the empty
// string becomes a lone '='. So neither a dot nor a wildcard, a space or a control
// character gets into a subject, and the model id comes back unchanged.
func EncodeToken(s string) string {
	escapes := 0
	for i := 0; i < len(s); i++ {
		if !plain(s[i]) {
			escapes++
		}
	}
	if escapes == 0 {
		if s == "" {
			return "="
		}
		return s
	}
	b := make([]byte, 0, len(s)+2*escapes)
	for i := 0; i < len(s); i++ {
		if c := s[i]; plain(c) {
			b = append(b, c)
		} else {
			b = append(b, '=', upperHex[c>>4], upperHex[c&15])
		}
	}
	return string(b)
}

// DecodeToken is the inverse of EncodeToken. It accepts only what EncodeToken
// makes, so that two tokens never mean the same string.
func DecodeToken(token string) (string, error) {
	if token == "=" {
		return "", nil
	}
	b := make([]byte, 0, len(token))
	for i := 0; i < len(token); i++ {
		c := token[i]
		if plain(c) {
			b = append(b, c)
			continue
		}
		if c != '=' || i+2 >= len(token) {
			return "", fmt.Errorf("subject token %q: bad byte at %d", token, i)
		}
		hi, lo := strings.IndexByte(upperHex, token[i+1]), strings.IndexByte(upperHex, token[i+2])
		if hi < 0 || lo < 0 || plain(byte(hi<<4|lo)) {
			return "", fmt.Errorf("subject token %q: bad escape at %d", token, i)
		}
		b = append(b, byte(hi<<4|lo))
		i += 2
	}
	if len(b) == 0 {
		return "", fmt.Errorf("subject token is empty")
	}
	return string(b), nil
}

const connectionPrefix = "ownllm-worker "

// ConnectionName is the name of a worker's connection whose end means that the run of the
// agent has ended, unless it comes back.
func ConnectionName(t TenantID, i Incarnation) string {
	return connectionPrefix + EncodeToken(string(t)) + "." + EncodeToken(string(i))
}

// ParseConnectionName is the inverse of ConnectionName, and false for other names.
func ParseConnectionName(name string) (TenantID, Incarnation, bool) {
	rest, ok := strings.CutPrefix(name, connectionPrefix)
	tenant, incarnation, err := parseAgent(rest)
	return tenant, Incarnation(incarnation), ok && err == nil
}
