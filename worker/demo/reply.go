package demo

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// What the model says when nothing else is asked of it.
var (
	opening = split("This is the OwnLLM demo: no model and no GPU is behind this reply, but everything between your client and it is real.")
	closing = split(" Start Ollama, vLLM or llama.cpp on this machine, run OwnLLM again, and a real model answers here.")
)

// filler are the tokens that make a reply as long as is asked for. Some have letters
// of several bytes, so that whoever cuts a stream of them wrongly is found out.
var filler = split(" and so on, token by token, über naïve Größen, through the broker, the bus and back, 東京 to Αθήνα, the same again each time 🚀 for")

const numberedLength = 64

var numbers = func() (rendered [4096]string) {
	for i := range rendered {
		rendered[i] = " " + strconv.Itoa(i)
	}
	return rendered
}()

// split cuts a text into tokens: a word with the white space before it, or a piece of
// 16 bytes of that. Put together they are the text again.
func split(s string) []string {
	const most = 16
	tokens := make([]string, 0, len(s)/5+1)
	start, word := 0, false
	for i, r := range s {
		space := unicode.IsSpace(r)
		if space && word || i-start+utf8.RuneLen(r) > most && i > start {
			tokens = append(tokens, s[start:i])
			start, word = i, false
		}
		word = word || !space
	}
	if start < len(s) {
		tokens = append(tokens, s[start:])
	}
	return tokens
}

// reply is all that will be said, and how it ends. Its tokens have positions: first
// come those of the reasoning, then those of the content or the tool calls.
type reply struct {
	reasoning int
	numbered  bool
	lead      []string // the content; after it comes filler
	offset    int      // where in the filler
	calls     []call
	pieces    []piece

	start   int    // position of the first token
	partial string // what is left of it, if a continued text ended inside it
	end     int    // position after the last token
	finish  string // finish_reason

	fail   failure
	failAt int // position
}

// call is one tool call.
type call struct {
	id, name, arguments string
}

// piece is one token of a tool call: the first says which tool, the others are its
// arguments.
type piece struct {
	call      int
	opens     bool
	arguments string
}

// plan works out the reply to a request.
func plan(q *request, f *Faults, m *schemas.Model) (*reply, error) {
	p := &reply{reasoning: f.ReasoningTokens, numbered: f.Numbered, finish: "stop"}
	if err := p.planCalls(q, f); err != nil {
		return nil, err
	}
	length := len(p.pieces)
	if len(p.calls) > 0 {
		p.finish = "tool_calls"
	} else {
		length = p.planContent(q, f)
	}
	total := p.reasoning + length
	if q.continues && len(p.calls) == 0 {
		p.resume(q.prefix, total)
	}
	p.end = total
	limit := total - p.start
	if q.maxTokens > 0 {
		limit = min(limit, q.maxTokens)
	}
	if m.ContextWindow > 0 {
		limit = min(limit, m.ContextWindow-q.tokens)
	}
	if p.start+limit < p.end {
		p.end, p.finish = p.start+limit, "length"
	}
	p.fail, p.failAt = f.failure(p.start)
	return p, nil
}

// planContent chooses what to say, and returns how many tokens it has.
func (p *reply) planContent(q *request, f *Faults) int {
	switch format := q.format.Get("type").Str; {
	case f.Echo:
		p.numbered, p.lead = false, split(q.body)
	case f.Text != "":
		p.numbered, p.lead = false, split(f.Text)
	case f.Numbered && f.Tokens > 0:
		return f.Tokens
	case f.Numbered:
		return numberedLength
	case format == "json_schema":
		n := instancer{budget: maxSchemaBytes}
		p.lead = split(n.instance(q.format.Get("json_schema.schema")))
	case format == "json_object":
		p.lead = split(string(schemas.AppendString([]byte(`{"demo": true, "reply": `), clip(q.lastUser()))) + `}`)
	case f.Tokens > 0 && f.Tokens <= len(opening):
		p.lead = opening
		return f.Tokens
	default:
		p.lead = sentence(q)
		h := fnv.New32a()
		_, _ = h.Write([]byte(q.lastUser())) // never fails
		p.offset = int((uint64(h.Sum32()) + uint64(q.seed)) % uint64(len(filler)))
		if f.Tokens > 0 {
			return f.Tokens
		}
	}
	return len(p.lead)
}

// sentence is what the model says by itself.
func sentence(q *request) []string {
	tokens := append([]string(nil), opening...)
	if len(q.images) > 0 {
		tokens = append(tokens, split(fmt.Sprintf(" You sent %d image(s): %s.", len(q.images), strings.Join(q.images, ", ")))...)
	}
	if said := strings.TrimSpace(q.lastUser()); said != "" {
		tokens = append(tokens, split(` You said: "`+clip(said)+`"`)...)
	}
	return append(tokens, closing...)
}

// planCalls decides on tool calls.
func (p *reply) planCalls(q *request, f *Faults) error {
	tools := q.tools.Array()
	count, forced := f.ToolCalls, ""
	switch choice := q.toolChoice; {
	case choice.IsObject():
		forced = choice.Get("function.name").Str
		if !slices.ContainsFunc(tools, func(tool gjson.Result) bool { return tool.Get("function.name").Str == forced }) {
			return fmt.Errorf("tool_choice names the tool %q, which isn't among the tools", clip(forced))
		}
		count = max(count, 1)
	case choice.Str == "required":
		if len(tools) == 0 {
			return fmt.Errorf("tool_choice is %q, but there are no tools", choice.Str)
		}
		count = max(count, 1)
	}
	if forced != "" {
		tools = slices.DeleteFunc(tools, func(tool gjson.Result) bool { return tool.Get("function.name").Str != forced })
	}
	n := instancer{budget: maxSchemaBytes}
	for i := range count {
		c := call{name: "demo_tool", arguments: "{}"}
		switch {
		case len(tools) > 0 && i >= len(tools):
			c = p.calls[i%len(tools)]
		case len(tools) > 0:
			function := tools[i].Get("function")
			c.name = function.Get("name").Str
			if schema := function.Get("parameters"); schema.Exists() {
				c.arguments = n.instance(schema)
			}
		}
		c.id = fmt.Sprintf("call_demo_%d", i)
		p.calls = append(p.calls, c)
		p.pieces = append(p.pieces, piece{call: i, opens: true})
		for _, s := range split(c.arguments) {
			p.pieces = append(p.pieces, piece{call: i, arguments: s})
		}
	}
	return nil
}

// resume moves the start to where the prefix ends, if the reply begins with it.
func (p *reply) resume(prefix string, total int) {
	pos := p.reasoning
	for rest := prefix; rest != ""; pos++ {
		if pos == total {
			return
		}
		token := p.token(pos, 0)
		after, whole := strings.CutPrefix(rest, token)
		if !whole {
			if !strings.HasPrefix(token, rest) {
				return
			}
			p.partial = token[len(rest):]
			break
		}
		rest = after
	}
	// Nothing said yet is nothing to continue: the reasoning comes first then.
	if prefix != "" {
		p.start = pos
	}
}

// token returns the text of one position that isn't of a tool call.
func (p *reply) token(pos, choice int) string {
	if p.partial != "" && pos == p.start && choice == 0 {
		return p.partial
	}
	if pos < p.reasoning {
		if p.numbered {
			return number(pos)
		}
		return filler[pos%len(filler)]
	}
	i := pos - p.reasoning
	switch {
	case p.numbered && choice > 0:
		return " " + strconv.Itoa(choice) + ":" + strconv.Itoa(i)
	case p.numbered:
		return number(i)
	case i < len(p.lead):
		return p.lead[i]
	}
	return filler[(p.offset+i-len(p.lead))%len(filler)]
}

func number(i int) string {
	if i < len(numbers) {
		return numbers[i]
	}
	return " " + strconv.Itoa(i)
}

// stretch returns the end of a run of at most most tokens from pos that fit in one
// chunk: of one kind, of one tool call, and before a failure.
func (p *reply) stretch(pos, most int) int {
	next := min(pos+most, p.end)
	if p.fail != failNone && pos < p.failAt {
		next = min(next, p.failAt)
	}
	if pos < p.reasoning {
		return min(next, p.reasoning)
	}
	if len(p.calls) == 0 {
		return next
	}
	first := p.pieces[pos-p.reasoning]
	if first.opens {
		return pos + 1
	}
	for i := pos + 1; i < next; i++ {
		if p.pieces[i-p.reasoning].opens {
			return i
		}
	}
	return next
}

// callsUntil returns the tool calls as far as they are said at the position end.
func (p *reply) callsUntil(end int) []call {
	var calls []call
	for i := 0; i < len(p.pieces) && p.reasoning+i < end; i++ {
		switch part := p.pieces[i]; {
		case part.opens:
			calls = append(calls, call{id: p.calls[part.call].id, name: p.calls[part.call].name})
		default:
			calls[len(calls)-1].arguments += part.arguments
		}
	}
	return calls
}
