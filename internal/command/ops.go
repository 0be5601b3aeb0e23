package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/ownllm/ownllm/edge"
)

// open listens on both addresses.
func (o ListenOptions) open() (api, ops net.Listener, err error) {
	if api, err = listen("--listen", o.Listen); err != nil {
		return nil, nil, err
	}
	if ops, err = listen("--ops-listen", o.OpsListen); err != nil {
		_ = api.Close()
		return nil, nil, err
	}
	return api, ops, nil
}

func listen(flag, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w. Is another ownllm running? Choose another port, or 0 for a free one", flag, err)
	}
	return l, nil
}

// opsPart serves operators: metrics, health and profiles. It has no authentication
// and is for an address that clients can't reach.
func opsPart(l net.Listener, tel *tele, e *edge.Edge) part {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", tel.Handler())
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	})
	if e != nil {
		mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
			ready := e.Readiness(r.Context())
			status := http.StatusOK
			if !ready.Ready {
				status = http.StatusServiceUnavailable
			}
			writeJSON(w, status, ready)
		})
	}
	return part{"operations", func(ctx context.Context) error {
		server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
		stop := context.AfterFunc(ctx, func() { _ = server.Close() })
		defer stop()
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // a client that is gone needs no answer
}
