package demo

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"
)

// discard is a ResponseWriter that costs nothing.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}
func (d discard) Flush()                      {}

var benchBodies = []struct{ name, body string }{
	{"stream32", ask(`"stream":true,"stream_options":{"include_usage":true},"demo":{"tokens":32}`)},
	{"whole32", ask(`"demo":{"tokens":32}`)},
}

// BenchmarkHandler is the demo model without HTTP: what it adds to a benchmark.
func BenchmarkHandler(b *testing.B) {
	for _, bench := range benchBodies {
		b.Run(bench.name, func(b *testing.B) {
			s := New(Options{})
			request := httptest.NewRequest("POST", "/v1/chat/completions", nil)
			request.ContentLength = int64(len(bench.body))
			body := bytes.NewReader(nil)
			request.Body = io.NopCloser(body)
			b.ReportAllocs()
			for b.Loop() {
				body.Reset([]byte(bench.body))
				s.ServeHTTP(discard{http.Header{}}, request)
			}
		})
	}
}

// BenchmarkServer is the demo model over HTTP, with as many clients as processors.
func BenchmarkServer(b *testing.B) {
	for _, bench := range benchBodies {
		b.Run(bench.name, func(b *testing.B) {
			_, url := server(b, Options{})
			transport := &http.Transport{MaxIdleConnsPerHost: 64}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport}
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					response, err := client.Post(url+"/v1/chat/completions", "application/json", bytes.NewReader([]byte(bench.body)))
					if err != nil {
						b.Error(err)
						return
					}
					_, _ = io.Copy(io.Discard, response.Body)
					response.Body.Close()
				}
			})
		})
	}
}

// A thousand streams keep their pace together, and no stream has a goroutine of its
// own beside the one that net/http gives it.
func TestManyStreamsKeepThePace(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds of real time")
	}
	s := New(Options{})
	const streams, tokens, pace = 1000, 50, 25
	body := ask(`"stream":true,"demo":{"numbered":true,"tokens":50,"tokens_per_second":25}`)
	var all sync.WaitGroup
	start := time.Now()
	for range streams {
		all.Go(func() {
			request := httptest.NewRequest("POST", "/v1/chat/completions", bytes.NewReader([]byte(body)))
			s.ServeHTTP(discard{http.Header{}}, request.WithContext(context.Background()))
		})
	}
	all.Wait()
	took := time.Since(start)
	want := time.Second * (tokens - 1) / pace
	if took < want || took > 5*want { // not one after the other, however busy the machine
		t.Errorf("%d streams took %v, want %v", streams, took, want)
	}
	if stats := s.Stats(); stats.Finished != streams || stats.Tokens != streams*tokens {
		t.Errorf("stats: %+v", stats)
	}
	t.Logf("%d streams took %v, want %v", streams, took, want)
}
