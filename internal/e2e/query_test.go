package e2e

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"go.yaml.in/yaml/v3"

	"github.com/ownllm/ownllm/broker/metric"
	"github.com/ownllm/ownllm/schemas"
)

func pemOf(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// queries are those of the dashboard and of the alert rules, by where they stand.
func queries(t *testing.T) map[string]string {
	t.Helper()
	found := make(map[string]string)
	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	d := yaml.NewDecoder(strings.NewReader(read(t, "scripts/compose/alerts.yml")))
	d.KnownFields(false)
	if err := d.Decode(&rules); err != nil {
		t.Fatal(err)
	}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			if r.Alert == "" || r.For == "" || r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("an alert lacks something: %+v", r)
			}
			found["alert "+r.Alert] = r.Expr
		}
	}
	var dashboard struct {
		UID    string `json:"uid"`
		Panels []struct {
			ID      int    `json:"id"`
			Type    string `json:"type"`
			Title   string `json:"title"`
			Targets []struct{ Expr, LegendFormat string }
		} `json:"panels"`
	}
	if err := json.Unmarshal([]byte(read(t, "scripts/compose/grafana/ownllm.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	ids := make(map[int]bool)
	for _, p := range dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		if ids[p.ID] = true; p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %s shows nothing", p.Title)
		}
		for i, target := range p.Targets {
			// Grafana puts a length of time there.
			found["panel "+p.Title+" "+string(rune('A'+i))] = strings.ReplaceAll(target.Expr, "$__rate_interval", "1m")
		}
	}
	return found
}

// TestQueries: what the dashboard and the alerts ask is PromQL, and the codes and states that
// they name are there.
func TestQueries(t *testing.T) {
	all := queries(t)
	if len(all) < 40 {
		t.Errorf("only %d queries found", len(all))
	}
	for where, query := range all {
		expr, err := parser.NewParser(parser.Options{}).ParseExpr(query)
		if err != nil {
			t.Errorf("%s: %v", where, err)
			continue
		}
		for _, s := range parser.ExtractSelectors(expr) {
			for _, m := range s {
				if m.Name == "state" && !slices.ContainsFunc(s, func(m *labels.Matcher) bool { return m.Name == "proxy" }) { // HAProxy has its own
					for state := range strings.SplitSeq(m.Value, "|") {
						if !slices.Contains([]schemas.AgentState{schemas.AgentUp, schemas.AgentDraining, metric.StateAside, metric.StateAway}, schemas.AgentState(state)) {
							t.Errorf("%s: there is no state %q", where, state)
						}
					}
				}
				if m.Name != "code" {
					continue
				}
				for code := range strings.SplitSeq(m.Value, "|") {
					if c := schemas.Code(code); !c.Known() && c != metric.CodeOK && c != metric.CodeClientGone {
						t.Errorf("%s: there is no code %q", where, code)
					}
				}
			}
		}
	}
}

// rare are counters that aren't exported before they count something, with their labels.
var rare = map[string][]string{
	exportedName(metric.NameFailovers) + "_total": nil,
	exportedName(metric.NameTopUps) + "_total":    {"outcome"},
}

func exportedName(name string) string { return strings.ReplaceAll(name, ".", "_") }

// checkQueries holds the queries against series that were exported: each metric that they
// ask for is there, with the labels by which they ask.
func checkQueries(t *testing.T, exported map[string]bool) {
	t.Helper()
	labels := maps.Clone(rare)
	label := regexp.MustCompile(`([a-zA-Z_]\w*)="`)
	for s := range exported {
		name, rest, _ := strings.Cut(s, "{")
		for _, m := range label.FindAllStringSubmatch(rest, -1) {
			labels[name] = append(labels[name], m[1])
		}
		if labels[name] == nil {
			labels[name] = []string{}
		}
	}
	labels["up"] = nil // Prometheus's own, and HAProxy's
	labels["haproxy_server_status"] = []string{"proxy", "state", "server"}
	for where, query := range queries(t) {
		expr, err := parser.NewParser(parser.Options{}).ParseExpr(query)
		if err != nil {
			continue // TestQueries says it
		}
		var metrics []string
		var wanted []string
		parser.Inspect(expr, func(node parser.Node, _ []parser.Node) error {
			switch n := node.(type) {
			case *parser.VectorSelector:
				metrics = append(metrics, n.Name)
				for _, m := range n.LabelMatchers {
					if m.Name != "__name__" {
						wanted = append(wanted, m.Name)
					}
				}
			case *parser.AggregateExpr:
				wanted = append(wanted, n.Grouping...)
			}
			return nil
		})
		for _, name := range metrics {
			have, ok := labels[name]
			if !ok {
				t.Errorf("%s: nobody exports %s", where, name)
				continue
			}
			for _, want := range wanted {
				if !slices.Contains([]string{"job", "instance"}, want) && !slices.Contains(have, want) {
					t.Errorf("%s: %s has no label %s, but %v", where, name, want, have)
				}
			}
		}
	}
}
