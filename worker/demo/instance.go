package demo

import (
	"strconv"
	"strings"

	"github.com/tidwall/gjson"

	"github.com/ownllm/ownllm/schemas"
)

// maxSchemaBytes is how much schema is read for one request. References and repeated
// elements make the work much larger than the request: without a bound, 100 KB of it
// took two minutes.
const maxSchemaBytes = 4 << 20

// instancer makes values that fit JSON Schemas.
type instancer struct {
	root   gjson.Result // the whole of the schema at hand
	budget int          // bytes that may still be read
}

// instance returns the least value that fits the schema, as JSON.
func (n *instancer) instance(schema gjson.Result) string {
	n.root = schema
	return string(n.append(nil, schema, 0))
}

// append appends the least value that fits a JSON Schema: of an object its
// required members, of an array as many elements as it must have, and the first of
// several choices. pattern and the like are beyond it. Where a schema goes on for ever,
// or costs too much, it gets null.
func (n *instancer) append(dst []byte, schema gjson.Result, depth int) []byte {
	const deepest, longest = 32, 64 << 10
	if depth > deepest || len(dst) > longest || n.budget <= 0 {
		return append(dst, "null"...)
	}
	n.budget -= len(schema.Raw) + 64
	if ref := schema.Get(`\$ref`); ref.Exists() {
		return n.append(dst, resolve(ref.Str, n.root), depth+1)
	}
	if value := schema.Get("const"); value.Exists() {
		return append(dst, value.Raw...)
	}
	if value := schema.Get("enum.0"); value.Exists() {
		return append(dst, value.Raw...)
	}
	for _, key := range [...]string{"anyOf.0", "oneOf.0", "allOf.0"} {
		if choice := schema.Get(key); choice.Exists() {
			return n.append(dst, choice, depth+1)
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
		return appendNumber(dst, schema)
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
			dst = n.append(dst, schema.Get("items"), depth+1)
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
		dst = n.append(dst, properties[key.Str], depth+1)
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

func appendNumber(dst []byte, schema gjson.Result) []byte {
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
