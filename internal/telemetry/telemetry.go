// Package telemetry sets OpenTelemetry up for a process. It is the only importer of
// the OTel SDK, its exporters and Prometheus; everybody else uses the API, through
// broker/metric and broker/trace.
//
// Metrics are always there to be scraped, at Handler. Traces and metrics leave the
// process over OTLP only if the standard environment asks for it:
//
//	OTEL_EXPORTER_OTLP_ENDPOINT            where to send both, by HTTP
//	OTEL_EXPORTER_OTLP_TRACES_ENDPOINT     where to send traces
//	OTEL_EXPORTER_OTLP_METRICS_ENDPOINT    where to send metrics
//	OTEL_TRACES_EXPORTER=none              send no traces
//	OTEL_METRICS_EXPORTER=none             send no metrics
//	OTEL_SDK_DISABLED=true                 send nothing
//
// The SDK itself reads the rest: OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE, _TIMEOUT,
// OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
// OTEL_METRIC_EXPORT_INTERVAL and more. A collector that is away costs a line in
// the log now and then, never a request.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// Config says who speaks.
type Config struct {
	// Service is the service.name, "ownllm-edge" say. OTEL_SERVICE_NAME overrides it.
	Service string
	// Version is the service.version.
	Version string
	// Log gets what the SDK and its exporters complain about.
	Log *slog.Logger
}

// Telemetry is the telemetry of a process.
type Telemetry struct {
	tracers  trace.TracerProvider
	meters   metric.MeterProvider
	handler  http.Handler
	shutdown []func(context.Context) error
}

// Start sets the providers up and makes them the global ones, along with the W3C
// propagator and an error handler that logs. Close it with Shutdown. The errors are
// of the environment: an endpoint or an attribute that can't be parsed.
func Start(ctx context.Context, c Config) (*Telemetry, error) {
	otel.SetLogger(logr.FromSlogHandler(c.Log.Handler()))
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		c.Log.WarnContext(ctx, "telemetry", "error", err)
	}))
	if protocol := os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL"); protocol == "grpc" && (wanted("TRACES") || wanted("METRICS")) {
		c.Log.WarnContext(ctx, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc is not spoken here, telemetry is sent as http/protobuf")
	}
	// The later detectors win, so that the environment overrides the program.
	res, err := resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithService(),
		resource.WithAttributes(
			attribute.String("service.name", c.Service),
			attribute.String("service.version", c.Version)),
		resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("telemetry resource: %w", err)
	}
	t := &Telemetry{}
	if err := t.startTraces(ctx, res); err != nil {
		return nil, err
	}
	if err := t.startMetrics(ctx, c, res); err != nil {
		return nil, errors.Join(err, t.Shutdown(ctx))
	}
	otel.SetTracerProvider(t.tracers)
	otel.SetMeterProvider(t.meters)
	otel.SetTextMapPropagator(propagation.TraceContext{})
	return t, nil
}

func (t *Telemetry) startTraces(ctx context.Context, res *resource.Resource) error {
	if !wanted("TRACES") {
		t.tracers = noop.NewTracerProvider()
		return nil
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return fmt.Errorf("OTLP trace exporter: %w", err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(res))
	t.tracers = provider
	t.shutdown = append(t.shutdown, provider.Shutdown)
	return nil
}

func (t *Telemetry) startMetrics(ctx context.Context, c Config, res *resource.Resource) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	reader, err := otelprometheus.New(otelprometheus.WithRegisterer(registry), otelprometheus.WithoutScopeInfo())
	if err != nil {
		return fmt.Errorf("prometheus exporter: %w", err)
	}
	options := []sdkmetric.Option{sdkmetric.WithResource(res), sdkmetric.WithReader(reader)}
	if wanted("METRICS") {
		exporter, err := otlpmetrichttp.New(ctx)
		if err != nil {
			return fmt.Errorf("OTLP metric exporter: %w", err)
		}
		options = append(options, sdkmetric.WithReader(sdkmetric.NewPeriodicReader(exporter)))
	}
	provider := sdkmetric.NewMeterProvider(options...)
	t.meters = provider
	t.shutdown = append(t.shutdown, provider.Shutdown)
	t.handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		Registry:          registry,
		EnableOpenMetrics: true,
		ErrorHandling:     promhttp.ContinueOnError,
		ErrorLog:          slog.NewLogLogger(c.Log.Handler(), slog.LevelWarn),
	})
	return nil
}

// wanted reports whether the environment asks to send a signal, TRACES or METRICS,
// over OTLP.
func wanted(signal string) bool {
	if strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") || os.Getenv("OTEL_"+signal+"_EXPORTER") == "none" {
		return false
	}
	return os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_"+signal+"_ENDPOINT") != ""
}

// TracerProvider returns the provider of traces, for trace.New. It records nothing
// unless the environment asks for traces.
func (t *Telemetry) TracerProvider() trace.TracerProvider { return t.tracers }

// MeterProvider returns the provider of metrics, for metric.New.
func (t *Telemetry) MeterProvider() metric.MeterProvider { return t.meters }

// Handler serves /metrics in the formats of Prometheus and OpenMetrics: the metrics
// of broker/metric and those of the Go runtime and the process.
func (t *Telemetry) Handler() http.Handler { return t.handler }

// Shutdown sends what hasn't been sent and stops what Start started. It takes no
// longer than ctx allows; what could not be sent by then is lost.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	var errs []error
	for _, shutdown := range t.shutdown {
		errs = append(errs, shutdown(ctx))
	}
	t.shutdown = nil
	return errors.Join(errs...)
}
