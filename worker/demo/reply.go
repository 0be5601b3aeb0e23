package demo

import (
	"fmt"
	"hash/fnv"
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
		schema := q.format.Get("json_schema.schema")
		p.lead = split(string(appendInstance(nil, schema, schema, 0)))
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
		known := false
		for _, tool := range tools {
			known = known || tool.Get("function.name").Str == forced
		}
		if !known {
			return fmt.Errorf("tool_choice names the tool %q, which isn't among the tools", clip(forced))
		}
		count = max(count, 1)
	case choice.Str == "required":
		if len(tools) == 0 {
			return fmt.Errorf("tool_choice is %q, but there are no tools", choice.Str)
		}
		count = max(count, 1)
	}
	for i := range count {
		c := call{id: fmt.Sprintf("call_demo_%d", i), name: "demo_tool", arguments: "{}"}
		if len(tools) > 0 {
			function := tools[i%len(tools)].Get("function")
			for _, tool := range tools {
				if forced != "" && tool.Get("function.name").Str == forced {
					function = tool.Get("function")
				}
			}
			c.name = function.Get("name").Str
			if schema := function.Get("parameters"); schema.Exists() {
				c.arguments = string(appendInstance(nil, schema, schema, 0))
			}
		}
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

// appendInstance appends the least value that fits a JSON Schema: of an object its
// required members, of an array as many elements as it must have, and the first of
// several choices. pattern and the like are beyond it. A schema that goes on for ever
// gets null at some point.
func appendInstance(dst []byte, schema, root gjson.Result, depth int) []byte {
	const deepest, longest = 32, 64 << 10
	if depth > deepest || len(dst) > longest {
		return append(dst, "null"...)
	}
	if ref := schema.Get(`\$ref`); ref.Exists() {
		return appendInstance(dst, resolve(ref.Str, root), root, depth+1)
	}
	if value := schema.Get("const"); value.Exists() {
		return append(dst, value.Raw...)
	}
	if value := schema.Get("enum.0"); value.Exists() {
		return append(dst, value.Raw...)
	}
	for _, key := range [...]string{"anyOf.0", "oneOf.0", "allOf.0"} {
		if choice := schema.Get(key); choice.Exists() {
			return appendInstance(dst, choice, root, depth+1)
		}
	}
	kind := schema.Get("type")
	if kind.IsArray() {
		kind = kind.Get("0")
	}
	name := kind.Str
	if name == "" {
		switch {
		case schema.Get("items").Exists():
			name = "array"
		default:
			name = "object"
		}
	}
	switch name {
	case "string":
		return schemas.AppendString(dst, instanceString(schema))
	case "integer", "number":
		return appendInstanceNumber(dst, schema)
	case "boolean":
		return append(dst, "true"...)
	case "null":
		return append(dst, "null"...)
	case "array":
		dst = append(dst, '[')
		for i := range int(min(schema.Get("minItems").Int(), 64)) {
			if i > 0 {
				dst = append(dst, ", "...)
			}
			dst = appendInstance(dst, schema.Get("items"), root, depth+1)
		}
		return append(dst, ']')
	}
	dst = append(dst, '{')
	properties := schema.Get("properties").Map()
	for i, key := range schema.Get("required").Array() {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		dst = schemas.AppendString(dst, key.Str)
		dst = append(dst, ": "...)
		dst = appendInstance(dst, properties[key.Str], root, depth+1)
	}
	return append(dst, '}')
}

func instanceString(schema gjson.Result) string {
	switch schema.Get("format").Str {
	case "date-time":
		return "2026-01-01T00:00:00Z"
	case "date":
		return "2026-01-01"
	case "time":
		return "00:00:00Z"
	case "email":
		return "demo@example.com"
	case "uuid":
		return "00000000-0000-4000-8000-000000000000"
	case "uri":
		return "https://example.com/"
	}
	s := "demo"
	if least := int(min(schema.Get("minLength").Int(), 4096)); least > len(s) {
		s = strings.Repeat(s, least/len(s)+1)[:least]
	}
	if most := schema.Get("maxLength"); most.Exists() && int(most.Int()) < len(s) {
		s = s[:max(0, int(most.Int()))]
	}
	return s
}

func appendInstanceNumber(dst []byte, schema gjson.Result) []byte {
	n := 0.0
	if least := schema.Get("minimum"); least.Exists() {
		n = max(n, least.Num)
	}
	if least := schema.Get("exclusiveMinimum"); least.Exists() && n <= least.Num {
		n = least.Num + 1
	}
	if most := schema.Get("maximum"); most.Exists() {
		n = min(n, most.Num)
	}
	if most := schema.Get("exclusiveMaximum"); most.Exists() && n >= most.Num {
		n = most.Num - 1
	}
	return strconv.AppendFloat(dst, n, 'f', -1, 64)
}

// resolve finds a reference inside the same schema: "#/$defs/name".
func resolve(ref string, root gjson.Result) gjson.Result {
	path, ok := strings.CutPrefix(ref, "#")
	if !ok {
		return gjson.Result{}
	}
	found := root
	for _, key := range strings.Split(strings.TrimPrefix(path, "/"), "/") {
		if key == "" {
			continue
		}
		found = found.Map()[strings.NewReplacer("~1", "/", "~0", "~").Replace(key)]
	}
	return found
}
