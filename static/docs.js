// Shows /api-spec.yaml in Swagger UI. A file of its own, so that the page needs no inline script
// (Content-Security-Policy); validatorUrl null keeps Swagger UI from asking any other host.
"use strict";

window.ui = SwaggerUIBundle({
  url: "/api-spec.yaml",
  dom_id: "#swagger-ui",
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  deepLinking: true,
  displayRequestDuration: true,
  persistAuthorization: false,
  showExtensions: true,
  queryConfigEnabled: false,
  tryItOutEnabled: true,
  validatorUrl: null,
});
