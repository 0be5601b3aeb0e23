package schemas

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"testing"
)

// constants returns the string constants of the package, name to value, that have the
// given type, or, for an empty type, those whose name begins with prefix and that have
// none. Tests hold lists against it, so that a new constant can't be forgotten in one.
func constants(t *testing.T, typ, prefix string) map[string]string {
	t.Helper()
	files, err := fs.Glob(os.DirFS("."), "*.go")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			group, ok := decl.(*ast.GenDecl)
			if !ok || group.Tok != token.CONST {
				continue
			}
			for _, spec := range group.Specs {
				value := spec.(*ast.ValueSpec)
				got := ""
				if ident, ok := value.Type.(*ast.Ident); ok {
					got = ident.Name
				}
				if got != typ || len(value.Values) != 1 || !strings.HasPrefix(value.Names[0].Name, prefix) {
					continue
				}
				if lit, ok := value.Values[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
					s, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Fatal(err)
					}
					found[value.Names[0].Name] = s
				}
			}
		}
	}
	if len(found) == 0 {
		t.Fatalf("no constants of type %q with prefix %q", typ, prefix)
	}
	return found
}
