package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"time"
)

// proxyConns is more than there are clients: without it the proxy would dial anew for
// nearly every request, since net/http keeps two connections to a host.
const proxyConns = 256

// serveProxy is a bare proxy in front of a backend until ctx ends. It says on stdout where
// it listens.
func serveProxy(ctx context.Context, backend string, stdout io.Writer) error {
	to, err := url.Parse(backend)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	transport := &http.Transport{MaxIdleConnsPerHost: proxyConns}
	defer transport.CloseIdleConnections()
	server := &http.Server{
		Handler: &httputil.ReverseProxy{
			Transport: transport, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) },
			ErrorLog: log.New(io.Discard, "", 0), // its clients count
		},
		ReadHeaderTimeout: replyWait,
	}
	defer context.AfterFunc(ctx, func() {
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = server.Shutdown(wait) // what is left is cut off with the process
	})()
	if _, err := fmt.Fprintf(stdout, "listening on http://%s\n", l.Addr()); err != nil {
		return err
	}
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
